#include "turned.h"

namespace truenorm {
namespace {

// A tile of a tensor as rows: where it lies, or turned in memory of its own.
template <class T>
class Side {
 public:
  Side(const Kernels<T>& kernels, bool turned, const Tiles& tiles, int64_t channels)
      : kernels_(kernels),
        positions_(tiles.positions()),
        channels_(channels),
        own_(turned ? scratch<T>(tiles.most() * channels) : nullptr) {}

  const T* read(const T* from, const Tile& tile) const {
    if (!own_) return from + tile.first;
    kernels_.turn(from + tile.turned, channels_, tile.rows, positions_, own_.get(), channels_,
                  false);
    return own_.get();
  }
  T* room(T* to, const Tile& tile) const { return own_ ? own_.get() : past(to, tile.first); }
  void write(T* to, const Tile& tile) const {
    if (!own_ || !to) return;
    kernels_.turn(own_.get(), tile.rows, channels_, channels_, to + tile.turned, positions_, true);
  }

 private:
  const Kernels<T>& kernels_;
  int64_t positions_, channels_;
  std::unique_ptr<T[]> own_;
};

}  // namespace

template <class T>
void forward_turned(const Forward<T>& f, const Turned& turned) {
  const Geometry& g = f.geometry;
  const Tiles tiles(g, turned.positions);
  struct Sides {
    Side<T> x, y;
  };
  const auto make = [&] {
    return Sides{{f.kernels, turned.x, tiles, g.c}, {f.kernels, turned.result, tiles, g.c}};
  };
  tiles.each(make, [&](int64_t, const Sides& sides, const Tile& tile) {
    const Geometry some = samples_of(g, tile.rows);
    Forward<T> part = f.part(0, some, nullptr);
    part.x = sides.x.read(f.x, tile);
    part.y = f.y ? sides.y.room(f.y, tile) : nullptr;
    part.mean += tile.row, part.var += tile.row;
    part.rows = past(f.rows, tile.row);
    part.stream = f.stream && !turned.result;
    forward_rows(part);
    sides.y.write(f.y, tile);
  });
}

template <class T>
void backward_turned(const Backward<T>& b, const Turned& turned) {
  const Geometry& g = b.geometry;
  const Tiles tiles(g, turned.positions);
  const auto sums = scratch<GradSums>(b.sums ? tiles.tasks() * g.c : 0);
  struct Sides {
    Side<T> grad, x, grad_x;
  };
  const auto make = [&] {
    return Sides{{b.kernels, turned.grad, tiles, g.c},
                 {b.kernels, turned.x, tiles, g.c},
                 {b.kernels, turned.result, tiles, g.c}};
  };
  tiles.each(make, [&](int64_t task, const Sides& sides, const Tile& tile) {
    const Geometry some = samples_of(g, tile.rows);
    Backward<T> part = b.part(0, some, nullptr, 0);
    part.grad = sides.grad.read(b.grad, tile);
    part.x = sides.x.read(b.x, tile);
    part.grad_x = b.grad_x ? sides.grad_x.room(b.grad_x, tile) : nullptr;
    part.mean += tile.row, part.var += tile.row;
    part.sums = b.sums ? sums.get() + task * g.c : nullptr;
    part.mean_grad = past(b.mean_grad, tile.row);
    part.mean_grad_x_hat = past(b.mean_grad_x_hat, tile.row);
    part.rows = past(b.rows, tile.row);
    part.stream = b.stream && !turned.result;
    backward_rows(part);
    sides.grad_x.write(b.grad_x, tile);
  });
  if (!b.sums) return;
  for (int64_t task = 0; task < tiles.tasks(); ++task)
    for (int64_t c = 0; c < g.c; ++c) b.sums[c].add(sums[task * g.c + c]);
}

TN_EVERY_TYPE(forward_turned, Forward, const Turned&)
TN_EVERY_TYPE(backward_turned, Backward, const Turned&)

}  // namespace truenorm
