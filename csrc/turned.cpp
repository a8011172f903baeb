#include "turned.h"

#include "tensors.h"

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

bool lies_as(const Tensor& t, const Dims& sizes, const Dims& strides) {
  for (int64_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && t.stride(d) != strides[d]) return false;
  return true;
}

}  // namespace

bool turn_into(const Tensor& to, const Tensor& from) {
  const int64_t dim = from.dim();
  if (dim < 3 || from.numel() == 0 || to.scalar_type() != from.scalar_type()) return false;
  const auto given = from.sizes();
  const Dims sizes(given.begin(), given.end());
  const Dims outside = contiguous_strides(sizes), inside = channels_last_strides(sizes);
  const bool in = lies_as(from, sizes, outside) && lies_as(to, sizes, inside);
  if (!in && !(lies_as(from, sizes, inside) && lies_as(to, sizes, outside))) return false;
  const int64_t channels = sizes[1], positions = from.numel() / sizes[0] / channels;
  with_type(from, [&]<class T>(T) {
    const Kernels<T>& use = table<T>(kernels());
    const T* const values = static_cast<const T*>(from.const_data_ptr());
    T* const room = static_cast<T*>(to.mutable_data_ptr());
    const Tiles tiles(sizes[0], positions, channels);
    tiles.each([] { return 0; },
               [&](int64_t, int, const Tile& t) {
                 if (in)
                   use.turn(values + t.turned, channels, t.rows, positions, room + t.first,
                            channels, false);
                 else
                   use.turn(values + t.first, t.rows, channels, channels, room + t.turned,
                            positions, true);
               });
  });
  return true;
}

template <class T>
void forward_turned(const Forward<T>& f, const Turned& turned) {
  const Geometry& g = f.geometry;
  const Tiles tiles(g.n / turned.positions, turned.positions, g.c);
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
  const Tiles tiles(g.n / turned.positions, turned.positions, g.c);
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
