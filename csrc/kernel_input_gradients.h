// Gradients of the input, value by value.
#pragma once

#include "kernel_elementwise.h"

namespace truenorm {
namespace {

template <class T>
void grad_apply_each(const T* grad, const T* x, T* grad_x, int64_t rows, int64_t len,
                     const GradAffines<compute_t<T>>& by, bool stream) {
  using P = InOrder<T>;
  using V = typename P::V;
  map_rows<P, 2>({grad, x}, grad_x, rows, len, stream, [&](const P* v, int64_t i) TN_FLAT {
    P out;
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * P::lanes;
      const V x_hat = (v[1].v[k] - load_raw<V>(by.hi + at)) * load_raw<V>(by.rstd + at);
      out.v[k] = v[0].v[k] * load_raw<V>(by.scale + at) +
                 (x_hat * load_raw<V>(by.slope + at) + load_raw<V>(by.shift + at));
    }
    return out;
  });
}

// grad · scale + (x − hi) · rstd · slope + shift with the coefficients of one run.
template <class V>
struct RunGradAffine {
  V scale, hi, rstd, slope, shift;

  template <class A>
  TN_INLINE RunGradAffine of(const GradAffine<A>& by) {
    return {splat<V>(by.scale), splat<V>(by.hi), splat<V>(by.rstd), splat<V>(by.slope),
            splat<V>(by.shift)};
  }
  TN_FLAT V operator()(V grad, V x) const {
    return grad * scale + ((x - hi) * rstd * slope + shift);
  }
};

// Of short runs, of(run) being a run's coefficients.
template <class T, class Of>
TN_INLINE void grad_short_runs(const T* grad, const T* x, T* grad_x, int64_t runs, int64_t len,
                               bool stream, const Of& of) {
  using A = compute_t<T>;
  int64_t served = 0;
  if (!stream)
    served = over_ends<2>({grad, x}, grad_x, runs, len, [&](int64_t r) TN_FLAT {
      return [run = RunGradAffine<typename Lane<T>::V>::of(of(r))](const auto(&v)[2])
                 TN_FLAT { return run(v[0], v[1]); };
    });
  grad += served * len, x += served * len, grad_x += served * len;
  over_short_runs<A, 5>(
      runs - served, len,
      [&](int64_t r) TN_FLAT {
        const GradAffine<A> by = of(served + r);
        return std::array<A, 5>{by.scale, by.hi, by.rstd, by.slope, by.shift};
      },
      [&](int64_t at, int64_t count, A(&by)[5][kShortRoom]) {
        grad_apply_each(grad + at, x + at, grad_x + at, 1, count,
                        GradAffines<A>{by[0], by[1], by[2], by[3], by[4]}, stream);
      });
}

template <class T>
void grad_apply(const T* grad, const T* x, T* grad_x, int64_t runs, int64_t len,
                const GradAffine<compute_t<T>>* by, bool stream) {
  using P = AnyOrder<T>;
  if (are_short(runs, len))
    return grad_short_runs(grad, x, grad_x, runs, len, stream,
                           [&](int64_t r) TN_FLAT { return by[r]; });
  for (int64_t r = 0; r < runs; ++r) {
    const auto run = RunGradAffine<typename P::V>::of(by[r]);
    const int64_t at = r * len;
    map<P, 2>({grad + at, x + at}, grad_x + at, len, stream, [&](const P* v, int64_t) TN_FLAT {
      return P{run(v[0].v[0], v[1].v[0]), run(v[0].v[1], v[1].v[1])};
    });
  }
}

template <class T>
void grad_apply_runs(const T* grad, const T* x, T* grad_x, int64_t runs, int64_t len,
                     const RunTerms& of, bool stream) {
  using A = compute_t<T>;
  A scale[kRunsTogether], hi[kRunsTogether], rstd[kRunsTogether], slope[kRunsTogether],
      shift[kRunsTogether];
  for (int64_t r = 0; r < runs; ++r) {
    const GradAffine<A> by(of.mean[r], of.rstd[r], of.weight[r], of.means.grad[r],
                           of.means.grad_x_hat[r]);
    scale[r] = by.scale, hi[r] = by.hi, rstd[r] = by.rstd, slope[r] = by.slope, shift[r] = by.shift;
  }
  grad_short_runs(grad, x, grad_x, runs, len, stream, [&](int64_t r) TN_FLAT {
    GradAffine<A> by;
    by.scale = scale[r], by.hi = hi[r], by.rstd = rstd[r], by.slope = slope[r], by.shift = shift[r];
    return by;
  });
}

// Of one run: by(i) is the weight, hi, rstd, slope and shift of what follows value i.
template <class T, class By>
TN_INLINE void map_grad_row(const T* grad, const T* x, T* grad_x, int64_t len, bool stream,
                            const By& by_of) {
  using P = InOrder<T>;
  map<P, 2>({grad, x}, grad_x, len, stream, [&](const P* v, int64_t i) TN_FLAT {
    P out;
    for (int k = 0; k < 2; ++k) {
      const auto [weight, hi, rstd, slope, shift] = by_of(i + k * P::lanes);
      out.v[k] = v[0].v[k] * weight * rstd + ((v[1].v[k] - hi) * rstd * slope + shift);
    }
    return out;
  });
}

template <class T>
void grad_apply_rows(const T* grad, const T* x, T* grad_x, int64_t rows, int64_t len, int64_t ld,
                     const compute_t<T>* weight, const double* mean, const double* rstds,
                     const RowSums& means, bool stream) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  struct Terms {
    V weight, hi, rstd, slope, shift;
  };
  GradAffine<A> by[kRowsTogether];
  for (int64_t r = 0; r < rows; ++r)
    by[r] = {mean[r], rstds[r], 1.0, means.grad[r], means.grad_x_hat[r]};
  if (len < kStep && ld == len) {
    Spread<A> hi, rstd, slope, shift;
    SpreadParameter<A> weights;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * len;
      hi.put(at, len, by[r].hi), rstd.put(at, len, by[r].rstd);
      slope.put(at, len, by[r].slope), shift.put(at, len, by[r].shift);
      weights.put(at, len, weight, A(1));
    }
    return map_grad_row(grad, x, grad_x, rows * len, stream, [&](int64_t i) TN_FLAT {
      return Terms{weights.at(i), hi.at(i), rstd.at(i), slope.at(i), shift.at(i)};
    });
  }
  Padded<A, kStep> padded;
  if (weight && len < kStep) weight = Padded<A, kStep>::fill(padded, weight, len, A{});
  for (int64_t r = 0; r < rows; ++r) {
    const V hi = splat<V>(by[r].hi), rstd = splat<V>(by[r].rstd), slope = splat<V>(by[r].slope),
            shift = splat<V>(by[r].shift);
    const int64_t at = r * ld;
    if (weight)
      map_grad_row(grad + at, x + at, grad_x + at, len, stream, [&](int64_t i) TN_FLAT {
        return Terms{load_raw<V>(weight + i), hi, rstd, slope, shift};
      });
    else
      map_grad_row(grad + at, x + at, grad_x + at, len, stream,
                   [&](int64_t) TN_FLAT { return Terms{splat<V>(A(1)), hi, rstd, slope, shift}; });
  }
}

// The same of rows about zero, where no mean of grad · weight is subtracted either.
template <class T>
void grad_apply_rows_about_zero(const T* grad, const T* x, T* grad_x, int64_t rows, int64_t len,
                                int64_t ld, const compute_t<T>* weight, const double* mean,
                                const double* rstds, const RowSums& means, bool stream) {
  if (len < kStep)  // where a row's coefficients take longer than its values
    return grad_apply_rows(grad, x, grad_x, rows, len, ld, weight, mean, rstds, means, stream);
  using A = compute_t<T>;
  using P = InOrder<T>;
  using V = typename P::V;
  const auto all = [&]<bool Weight>(std::bool_constant<Weight>) TN_FLAT {
    for (int64_t r = 0; r < rows; ++r) {
      const GradAffine<A> by(0.0, rstds[r], 1.0, 0.0, means.grad_x_hat[r]);
      const V rstd = splat<V>(by.rstd), slope = splat<V>(by.slope);
      const int64_t at = r * ld;
      map<P, 2>({grad + at, x + at}, grad_x + at, len, stream, [&](const P* v, int64_t i) TN_FLAT {
        P out;
        for (int k = 0; k < 2; ++k) {
          V g = v[0].v[k];
          if constexpr (Weight) g *= load_raw<V>(weight + i + k * P::lanes);
          out.v[k] = g * rstd + v[1].v[k] * rstd * slope;
        }
        return out;
      });
    }
  };
  weight ? all(std::true_type{}) : all(std::false_type{});
}

template <class T>
void grad_scale_each(const T* grad, T* grad_x, int64_t rows, int64_t len, const compute_t<T>* scale,
                     bool stream) {
  using P = InOrder<T>;
  using V = typename P::V;
  map_rows<P, 1>({grad}, grad_x, rows, len, stream, [&](const P* v, int64_t i) TN_FLAT {
    return P{v->v[0] * load_raw<V>(scale + i), v->v[1] * load_raw<V>(scale + i + P::lanes)};
  });
}

template <class T>
void grad_scale(const T* grad, T* grad_x, int64_t runs, int64_t len,
                const GradAffine<compute_t<T>>* of_runs, bool stream) {
  using P = AnyOrder<T>;
  using A = compute_t<T>;
  if (are_short(runs, len))
    return over_short_runs<A, 1>(
        runs, len, [&](int64_t r) TN_FLAT { return std::array<A, 1>{of_runs[r].scale}; },
        [&](int64_t at, int64_t count, const A(&scale)[1][kShortRoom]) {
          grad_scale_each(grad + at, grad_x + at, 1, count, scale[0], stream);
        });
  for (int64_t r = 0; r < runs; ++r) {
    const auto by = splat<typename P::V>(of_runs[r].scale);
    map<P, 1>({grad + r * len}, grad_x + r * len, len, stream,
              [&](const P* v, int64_t) TN_FLAT { return P{v->v[0] * by, v->v[1] * by}; });
  }
}

}  // namespace
}  // namespace truenorm
