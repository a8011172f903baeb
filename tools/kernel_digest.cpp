// Prints a digest of what every inner loop computes, for one instruction set. It needs neither
// torch nor threads, so that `make neon` can run it on another processor's emulator.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace truenorm {
namespace {

struct Digest {
  uint64_t state = 1469598103934665603u;

  template <class V>
  void add(const V* values, size_t count) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values);
    for (size_t i = 0; i < count * sizeof(V); ++i) state = (state ^ bytes[i]) * 1099511628211u;
  }
};

// about normal, the same on every machine
double next(uint64_t& state) {
  double sum = -3.0;
  for (int i = 0; i < 6; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    sum += double(state >> 40) * 0x1p-24;
  }
  return sum;
}

template <class T>
void run(const Kernels<T>& k, Digest& digest) {
  using A = compute_t<T>;
  constexpr int64_t kMost = 3 * 257 + 64;
  uint64_t state = 7;
  std::vector<double> wide(kMost), grads(kMost);
  std::vector<T> x(kMost), grad(kMost), out(kMost), also(kMost);
  std::vector<A> a(kMost), b(kMost), c(kMost), d(kMost), e(kMost), a_made(kMost), b_made(kMost);
  std::vector<double> mean(kMost), rstd(kMost), p(kMost), q(kMost);
  for (double offset : {0.0, 3.0, 1000.0}) {
    for (int64_t i = 0; i < kMost; ++i) {
      wide[i] = next(state) + offset;
      grads[i] = next(state);
      a[i] = A(next(state)), b[i] = A(next(state)), c[i] = A(next(state)), d[i] = A(next(state)),
      e[i] = A(next(state));
      mean[i] = offset + 0.1 * next(state), rstd[i] = 1.0 + 0.1 * next(state);
      p[i] = q[i] = 0.0;
    }
    k.narrow(wide.data(), x.data(), kMost);
    k.narrow(grads.data(), grad.data(), kMost);
    // both layouts, forward and backward: in float where it serves, and in double
    for (int64_t stride : {0, 100})
      for (double beta : {0.5, 0.75, 1.0})
        for (bool backward : {false, true}) {
          const ResponseTile tile{7, stride ? 33 : 5, stride, 5, 0.1, beta, 1.0};
          std::vector<float> near(2 * kMost);
          std::vector<double> far(8 * kMost);
          const T* const from = backward ? grad.data() : nullptr;
          const auto add_tile = [&] {
            for (int64_t c = 0; c < (stride ? 7 : 5); ++c)
              digest.add(out.data() + c * (stride ? stride : 7), stride ? 33 : 7);
          };
          if (!std::is_same_v<T, double>) {
            const bool finite = k.response(tile, from, x.data(), out.data(), near.data());
            digest.add(&finite, 1), add_tile();
          }
          k.response_exact(tile, from, x.data(), out.data(), far.data(), false), add_tile();
        }
    for (int64_t len : {1, 7, 15, 16, 17, 31, 32, 33, 49, 64, 100, 257}) {
      for (bool centred : {true, false}) {
        const Moments m = k.moments(x.data(), 2, len, 300, centred);
        Moments of_rows[kRowsTogether];
        k.row_moments(x.data(), std::min<int64_t>(kRowsTogether, kMost / len), len, kMost, centred,
                      of_rows);
        digest.add(&m, 1), digest.add(of_rows, std::min<int64_t>(kRowsTogether, kMost / len));
      }
      const GradSums sums = k.grad_sums(grad.data(), x.data(), 2, len, 300, mean[0], rstd[0]);
      digest.add(&sums, 1);
      k.column_moments(x.data(), 3, len, len, p.data(), q.data());
      digest.add(p.data(), len), digest.add(q.data(), len);
      k.column_grad_sums(grad.data(), x.data(), 3, len, len, mean.data(), rstd.data(), p.data(),
                         q.data());
      digest.add(p.data(), len), digest.add(q.data(), len);
      for (int64_t rows : {3, kRowsTogether})
        for (const auto row_grad_sums : {k.row_grad_sums, k.row_grad_sums_about_zero}) {
          double of_rows[2][kRowsTogether];
          row_grad_sums(grad.data(), x.data(), rows, len, std::min<int64_t>(len, 64), kMost,
                        mean.data(), rstd.data(), a.data(), {of_rows[0], of_rows[1]}, p.data(),
                        q.data());
          digest.add(of_rows[0], rows), digest.add(of_rows[1], rows);
          digest.add(p.data(), len), digest.add(q.data(), len);
        }

      const auto add_out = [&](int64_t count) { digest.add(out.data(), size_t(count)); };
      const Affine<T> by[2] = {{mean[0], rstd[0], a.data(), b.data(), 3},
                               {mean[1], rstd[1], nullptr, nullptr, 0}};
      const GradAffine<A> grad_by[2] = {{mean[0], rstd[0], 0.7, 0.2, -0.3},
                                        {mean[1], rstd[1], 1.0, 0.0, 0.1}};
      GradAffine<A> scales[2];
      scales[0].scale = a[0], scales[1].scale = a[1];
      Affines<T> each;
      A* const arrays[] = {c.data(), a.data(), b.data(), d.data(), e.data()};
      for (int64_t i = 0; i < Affines<T>::kArrays; ++i) each.of[i] = arrays[i];
      double means[2][2] = {{0.2, 0.0}, {-0.3, 0.1}};
      // more runs than lie within a vector of the last one's end
      constexpr int64_t kFew = 20;
      const int64_t runs = len * kFew <= kMost ? kFew : 0;
      std::vector<Affine<T>> by_run;
      std::vector<double> of_runs[5];
      for (int64_t r = 0; r < runs; ++r) {
        by_run.emplace_back(mean[r], rstd[r], a.data(), b.data(), r);
        for (int k = 0; k < 5; ++k)
          of_runs[k].push_back(k < 2 ? (k ? rstd : mean)[r] : double((k < 3 ? a : b)[k + r]));
      }
      const RunTerms terms = {of_runs[0].data(),
                              of_runs[1].data(),
                              of_runs[2].data(),
                              {of_runs[3].data(), of_runs[4].data()}};
      for (bool stream : {false, true}) {
        k.apply(x.data(), out.data(), 2, len, by, stream), add_out(2 * len);
        k.apply_each(x.data(), out.data(), 3, len, each, stream), add_out(3 * len);
        for (const bool biased : {true, false}) {
          const A* const bias = biased ? b.data() : nullptr;
          for (const bool rounds : {false, true})
            for (const double off : {1.0, 0.0}) {
              const RowAffine<T> rows[2] = {{off * mean[0], rstd[0], a.data(), bias, rounds},
                                            {off * mean[1], rstd[1], a.data(), bias, rounds}};
              k.apply_rows(x.data(), out.data(), 2, len, rows, stream), add_out(2 * len);
            }
        }
        k.grad_apply(grad.data(), x.data(), out.data(), 2, len, grad_by, stream), add_out(2 * len);
        k.grad_apply_each(grad.data(), x.data(), out.data(), 3, len,
                          {a.data(), b.data(), c.data(), d.data(), e.data()}, stream);
        add_out(3 * len);
        for (const auto grad_apply_rows : {k.grad_apply_rows, k.grad_apply_rows_about_zero}) {
          grad_apply_rows(grad.data(), x.data(), out.data(), 2, len, len, a.data(), mean.data(),
                          rstd.data(), {means[0], means[1]}, stream);
          add_out(2 * len);
        }
        k.apply(x.data(), out.data(), runs, len, by_run.data(), stream), add_out(runs * len);
        k.grad_apply_runs(grad.data(), x.data(), out.data(), runs, len, terms, stream);
        add_out(runs * len);
        for (const bool along : {false, true}) {
          const int64_t rows = std::min<int64_t>(len, 23), cols = std::min<int64_t>(len, 30);
          k.turn(x.data(), rows, cols, cols + 1, out.data(), rows + 1, along);
          for (int64_t i = 0; i < cols; ++i) digest.add(out.data() + i * (rows + 1), rows);
        }
        for (const bool swish : {false, true}) {
          k.gate(x.data(), grad.data(), a_made.data(), b_made.data(), len, swish);
          digest.add(a_made.data(), len), digest.add(b_made.data(), len);
          k.gated(a.data(), b.data(), grad.data(), out.data(), len, swish, {true, true});
          add_out(len);
          k.gated(a.data(), nullptr, grad.data(), out.data(), len, swish, {}), add_out(len);
          k.gate_grads(a.data(), x.data(), grad.data(), out.data(), also.data(), len, swish);
          add_out(len), digest.add(also.data(), len);
        }
        k.grad_scale(grad.data(), out.data(), 2, len, scales, stream), add_out(2 * len);
        k.grad_scale_each(grad.data(), out.data(), 3, len, a.data(), stream), add_out(3 * len);
      }
    }
  }
}

}  // namespace
}  // namespace truenorm

int main() {
  using namespace truenorm;
  const InstructionSet* set = instruction_set();
  if (!set) return 1;
  Digest digest;
  run(*set->f64, digest);
  run(*set->f32, digest);
  run(*set->bf, digest);
  run(*set->hf, digest);
  std::printf("%016llx %s\n", static_cast<unsigned long long>(digest.state), set->name);
}
