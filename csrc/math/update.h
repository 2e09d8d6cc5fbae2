// The update of one element: the only place in compiled code that has the formula. Both the CPU and
// the CUDA kernels include it.
#pragma once

#include "../prox_sgd.h"
#include "prox.h"

namespace prox_sgd {

// A group's options in the compute type C: all that a kernel knows of them.
//
// The update has no branches. An option that is off has coefficients that make its operation the
// identity, bit by bit: x * 1, fma(-0, +0, x), fma(1, x, -0) and x - (+0) are x for every x, -0 and
// NaN included.
template <typename C>
struct Coefficients {
  C minus_lr;
  C momentum;
  C one_minus_dampening;
  C weight_decay;           // l2_mode "coupled"; -0 where off
  C lookahead;              // nesterov: momentum; 1 where off
  C threshold;              // t1 = lr (l1 k)
  C scale;                  // l2_mode "proximal": r = 1 / (1 + lr (weight_decay k)); 1 where off
  C grad_factor;            // grad_coefficient / grad_scale; 1 where off
  uint32_t ascent;          // maximize: the sign bit
  uint32_t decay_mask;      // coupled weight decay: all ones
  uint32_t lookahead_mask;  // nesterov: all ones
  uint32_t lookahead_sign;  // the sign bit where nesterov is off
  uint32_t shrink_mask;     // threshold not 0: all ones
  uint32_t frozen_zeros;    // all ones: zeros (or what is at its start) stay, with no threshold
  MomentumMode mode;
};

// The options that schedulers, a gradient scaler or clipping change from step to step, and what the
// coefficients that depend on them need besides.
struct ScheduledOptions {
  double lr;
  double l1;
  double k;               // (1 - dampening) / (1 - momentum)
  double proximal_decay;  // weight_decay where l2_mode is "proximal", 0 where it isn't
  float grad_scale;
  float grad_coefficient;
};

// Heavy-ball momentum carries a constant gradient k times as far as lr alone. Thresholds are scaled
// by k: the fixed point of the update is then the minimiser of
// f(w) + l1 |w|_1 + weight_decay/2 |w|^2, at any momentum.
inline ScheduledOptions scheduled(const Options& o) {
  const double k = o.momentum == 0.0 ? 1.0 : (1.0 - o.dampening) / (1.0 - o.momentum);
  return {o.lr, o.l1, k, o.proximal ? o.weight_decay : 0.0, o.grad_scale, o.grad_coefficient};
}

// Sets the coefficients that depend on scheduled options: computed in float64 in the order of the
// formulas, then rounded once to C.
//
// The kernel calls it for values in device memory, which no host has checked. A schedule that ends
// at 0 may end a rounding error below it, where the step would take every weight off zero: a
// negative lr or l1 counts as 0.
template <typename C>
PROX_SGD_HD void set(Coefficients<C>& c, const ScheduledOptions& s) {
  const double lr = s.lr < 0.0 ? 0.0 : s.lr;
  const double l1 = s.l1 < 0.0 ? 0.0 : s.l1;
  c.minus_lr = static_cast<C>(-lr);
  c.threshold = c.frozen_zeros ? C(0) : static_cast<C>(mul_(lr, mul_(l1, s.k)));
  c.shrink_mask = c.threshold != C(0) ? 0xffffffffu : 0;
  c.scale = static_cast<C>(div_(1.0, add_(1.0, mul_(lr, mul_(s.proximal_decay, s.k)))));
  c.grad_factor =
      mul_(div_(C(1), static_cast<C>(s.grad_scale)), static_cast<C>(s.grad_coefficient));
}

template <typename C>
Coefficients<C> coefficients(const Options& o) {
  constexpr uint32_t all = 0xffffffffu;
  constexpr uint32_t sign = 0x80000000u;
  const bool coupled = !o.proximal && o.weight_decay != 0.0;
  const bool nesterov = o.nesterov && o.momentum != 0.0;
  Coefficients<C> c{};
  c.frozen_zeros = o.frozen_zeros ? all : 0;
  set(c, scheduled(o));
  c.momentum = static_cast<C>(o.momentum);
  c.one_minus_dampening = static_cast<C>(1.0 - o.dampening);
  c.weight_decay = coupled ? static_cast<C>(o.weight_decay) : -C(0);
  c.lookahead = nesterov ? c.momentum : C(1);
  c.ascent = o.maximize ? sign : 0;
  c.decay_mask = coupled ? all : 0;
  c.lookahead_mask = nesterov ? all : 0;
  c.lookahead_sign = nesterov ? 0 : sign;
  c.mode = o.momentum_mode();
  return c;
}

// How much of the update is computed. `general` is right for all options; the others leave out
// operations that would change no bits. On a CPU they take half the instructions, as the
// coefficients that are left stay in registers.
enum class UpdateForm {
  basic,     // momentum, dampening, coupled weight decay, L1
  nesterov,  // the same with Nesterov's momentum
  general,
};

// The form with the fewest operations that is right for these coefficients.
template <typename C>
UpdateForm simplest_form(const Coefficients<C>& c) {
  if (c.ascent || c.frozen_zeros || c.scale != C(1) || c.grad_factor != C(1)) {
    return UpdateForm::general;
  }
  return c.lookahead_mask ? UpdateForm::nesterov : UpdateForm::basic;
}

// The gradient's and the momentum's part of a step: returns v = p - lr s, of which the proximal map
// is taken, and updates momentum m for gradient g. `distance`: what coupled weight decay shrinks, p
// or its distance from the start. C may also be several elements in a vector.
//
// A caller who knows `mode`, which is c.mode, or `form` at compile time passes a constant. m is
// read only where mode is `running`; without momentum, m returns d, which nobody stores.
template <typename C>
PROX_SGD_HD C descend(const Coefficients<C>& c, MomentumMode mode, UpdateForm form, C p, C distance,
                      C g, C& m) {
  const bool general = form == UpdateForm::general;
  if (general) g = flip(mul_(g, c.grad_factor), c.ascent);
  const C d = fma_(c.weight_decay, keep(distance, c.decay_mask), g);
  const C averaged = fma_(c.one_minus_dampening, d, mul_(c.momentum, m));
  m = mode == MomentumMode::running ? averaged : d;
  C s = m;
  if (general) s = fma_(c.lookahead, m, flip(keep(d, c.lookahead_mask), c.lookahead_sign));
  if (form == UpdateForm::nesterov) s = fma_(c.lookahead, m, d);
  return fma_(c.minus_lr, s, p);
}

// One step of one element: updates parameter p and momentum m for gradient g, as descend() does.
template <typename C>
PROX_SGD_HD void update(const Coefficients<C>& c, MomentumMode mode, UpdateForm form, C& p, C g,
                        C& m) {
  const C v = descend(c, mode, form, p, p, g, m);
  if (form == UpdateForm::general) {
    const C moved = mul_(soft_threshold(v, c.threshold, c.shrink_mask), c.scale);
    p = clear_if_zero(p, c.frozen_zeros, moved);
  } else {
    p = soft_threshold(v, c.threshold);
  }
}

// The same where the penalties are those of p's distance from `start`. With a start of +0 the bits
// are those of update().
template <typename C>
PROX_SGD_HD void update_towards(C start, const Coefficients<C>& c, MomentumMode mode,
                                UpdateForm form, C& p, C g, C& m) {
  const auto stays = equal(p, start, c.frozen_zeros);
  const C v = descend(c, mode, form, p, sub_(p, start), g, m);
  C moved = soft_threshold_towards(start, v, c.threshold);
  if (form == UpdateForm::general) {
    moved = scale_towards(start, moved, c.scale);
    moved = choose(stays, start, moved);
  }
  p = moved;
}

}  // namespace prox_sgd
