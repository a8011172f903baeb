// Rows [N, P, C] of which some tensors lie turned, as [N, C, P]: the channels of an image, over
// which it is normalized. What lies so is turned tile by tile in cache, so that all of it moves
// through memory once, and the drivers of rows do the rest: the bits are theirs.
#pragma once

#include "layers.h"
#include "parallel.h"

namespace truenorm {

// Neighbouring positions of one sample.
struct Tile {
  int64_t row, rows;      // in the order of [N, P, C]
  int64_t first, turned;  // where its first value lies in that, and in [N, C, P]
};

class Tiles {
 public:
  Tiles(int64_t samples, int64_t positions, int64_t channels)
      : samples_(samples),
        positions_(positions),
        channels_(channels),
        most_(std::min(positions, rows_of_a_tile(channels))),
        per_task_(std::min(kTilesOfATask, ceil_div(positions, most_))),
        tasks_(ceil_div(positions, most_ * per_task_)) {}

  int64_t positions() const { return positions_; }
  int64_t most() const { return most_; }
  int64_t tasks() const { return samples_ * tasks_; }

  // make() makes what the tiles of a task share; body(task, that, tile) for each of them in order
  template <class Make, class Body>
  void each(const Make& make, const Body& body) const {
    parallel(tasks(), per_task_ * most_ * channels_, [&](int64_t task) {
      auto shared = make();
      const int64_t sample = task / tasks_, begin = task % tasks_ * per_task_ * most_;
      const int64_t end = std::min(positions_, begin + per_task_ * most_);
      for (int64_t at = begin; at < end; at += most_) {
        const int64_t row = sample * positions_ + at;
        body(task, shared,
             Tile{row, std::min(most_, end - at), row * channels_,
                  sample * channels_ * positions_ + at});
      }
    });
  }

 private:
  // whose sums are added up in order
  static constexpr int64_t kTilesOfATask = 4;

  // What a driver serves on this thread alone; a cache line of each channel at least.
  static int64_t rows_of_a_tile(int64_t channels) {
    constexpr int64_t kSquare = 16;
    if (channels > kPiece) return 1;
    return std::max(kSquare, kWorthAThread / channels / kSquare * kSquare);
  }

  int64_t samples_, positions_, channels_, most_, per_task_, tasks_;
};

// Which of a call's tensors lie turned.
struct Turned {
  int64_t positions;  // of a sample
  bool x, grad, result;
};

template <class T>
void forward_turned(const Forward<T>& f, const Turned& turned);
template <class T>
void backward_turned(const Backward<T>& b, const Turned& turned);

}  // namespace truenorm
