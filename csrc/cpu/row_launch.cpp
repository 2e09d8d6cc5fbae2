// Runs sets of coupled rows on threads, in pieces of some rows of all parameters of a set.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "../math/update.h"
#include "../rows.h"
#include "elements.h"
#include "rows.h"
#include "threads.h"

namespace prox_sgd::cpu {
namespace {

// What is read again to be scaled stays in a core's cache. Long pieces read long runs of memory.
constexpr int64_t kPieceElements = 32768;
constexpr int64_t kMaxPieceRows = 512;

struct Piece {
  const RowSet* set;
  size_t kernels;  // index of the set's
  int64_t begin;
  int64_t end;
};

int64_t width_of(const RowSet& set) {
  int64_t width = 0;
  for (const RowMember& member : set.members) width += member.width;
  return width;
}

int64_t rows_of_a_piece(int64_t width, int64_t rows) {
  return std::clamp<int64_t>(kPieceElements / width, 1, std::min(kMaxPieceRows, rows));
}

// The storage whose kernel leaves in float32 what a 16-bit parameter is to hold, so that it is
// rounded once, after its row was scaled.
Storage with_master(Storage storage) {
  if (storage == Storage::bfloat16) return Storage::bfloat16_master_momentum_bfloat16;
  if (storage == Storage::float16) return Storage::float16_master;  // momentum in float32
  return storage;
}

// What updates one member's elements, and the factor r that comes after the group's.
template <typename C>
struct MemberKernel {
  MemberKernel(const Options& options, Storage storage) {
    Options without_ridge = options;
    if (options.proximal) without_ridge.weight_decay = 0.0;
    c = coefficients<C>(without_ridge);
    ridge = coefficients<C>(options).scale;
    update = kernel_for(with_master(storage), c.mode, simplest_form(c), false);
  }

  Coefficients<C> c;
  double ridge;
  Kernel update;
};

// Where one member's rows of a piece are.
struct PieceOfMember {
  Operands at;    // its arrays from the piece's first row on
  void* weights;  // what is scaled: the parameter, its master or a copy in float32
  int64_t size;
};

template <typename T>
T* advanced(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return pointer == nullptr ? nullptr : static_cast<Byte*>(pointer) + bytes;
}

PieceOfMember part_of(const RowMember& member, const Piece& piece, const RowKernels& kernels) {
  const Operands& o = member.operands;
  const int64_t first = piece.begin * member.width;
  const auto skip = [&](size_t size) { return first * static_cast<int64_t>(size); };
  PieceOfMember part{};
  part.size = (piece.end - piece.begin) * member.width;
  part.at = {advanced(o.param, skip(kernels.param_size)),
             advanced(o.grad, skip(kernels.grad_size)),
             advanced(o.momentum_buffer, skip(kernels.momentum_size)),
             advanced(o.master_param, skip(kernels.weight_size)),
             part.size,
             o.num_zeros};
  part.weights = part.at.master_param != nullptr ? part.at.master_param : part.at.param;
  return part;
}

// Updates the elements. Of 16-bit storage `scratch` holds the weights in float32, and behind
// them the momentum of a float16 parameter, for which no storage with a master has a kernel.
template <typename C>
void update_elements(const MemberKernel<C>& kernel, const RowKernels& kernels, Storage storage,
                     PieceOfMember& part, float* scratch) {
  if (kernels.widen == nullptr) {
    kernel.update(part.at, &kernel.c, 0, part.size);
    return;
  }
  Operands wide = part.at;
  part.weights = wide.master_param = scratch;
  kernels.widen(part.at.param, scratch, part.size);
  const bool widen_momentum = storage == Storage::float16 && kernel.c.mode != MomentumMode::none;
  if (widen_momentum) {
    float* const momentum = scratch + part.size;
    wide.momentum_buffer = momentum;
    if (kernel.c.mode == MomentumMode::running) {
      kernels.widen(part.at.momentum_buffer, momentum, part.size);
    }
  }
  kernel.update(wide, &kernel.c, 0, part.size);
  if (widen_momentum) {
    kernels.narrow(scratch + part.size, part.at.momentum_buffer, part.size);
  }
}

// `scratch`: room for twice the piece's elements where storage has 16 bits and no master.
template <typename C>
void run_piece(const Piece& piece, const std::vector<MemberKernel<C>>& members, float* scratch) {
  const RowSet& set = *piece.set;
  const RowKernels kernels = row_kernels_for(set.storage);
  const int64_t rows = piece.end - piece.begin;
  double factors[kMaxPieceRows] = {};
  // Pointers into the scratch memory are worked out again for the second pass.
  float* free = scratch;
  for (size_t n = 0; n < set.members.size(); ++n) {
    PieceOfMember part = part_of(set.members[n], piece, kernels);
    update_elements(members[n], kernels, set.storage, part, free);
    kernels.add_squares(part.weights, rows, set.members[n].width, factors);
    free += part.size;
  }
  kernels.to_factors(factors, set.thresholds + piece.begin, rows);
  free = scratch;
  for (size_t n = 0; n < set.members.size(); ++n) {
    PieceOfMember part = part_of(set.members[n], piece, kernels);
    if (kernels.widen != nullptr) part.weights = free;
    const int64_t zeros = kernels.scale(part.at.param, part.weights, rows, set.members[n].width,
                                        factors, members[n].ridge, part.at.num_zeros != nullptr);
    if (part.at.num_zeros != nullptr) {
      __atomic_fetch_add(part.at.num_zeros, zeros, __ATOMIC_RELAXED);
    }
    free += part.size;
  }
}

// Runs the sets whose compute type is C.
template <typename C>
void run(const std::vector<RowSet>& sets, const std::vector<Options>& options, int threads) {
  constexpr bool kWide = sizeof(C) == 8;
  std::vector<std::vector<MemberKernel<C>>> kernels;
  std::vector<Piece> pieces;
  int64_t elements = 0;
  int64_t scratch_size = 0;
  for (const RowSet& set : sets) {
    if ((set.storage == Storage::float64) != kWide) continue;
    std::vector<MemberKernel<C>> of_set;
    for (const RowMember& member : set.members) {
      of_set.emplace_back(options[member.options], set.storage);
    }
    const int64_t width = width_of(set);
    const int64_t rows = rows_of_a_piece(width, set.rows);
    for (int64_t begin = 0; begin < set.rows; begin += rows) {
      pieces.push_back({&set, kernels.size(), begin, std::min(begin + rows, set.rows)});
    }
    if (with_master(set.storage) != set.storage) {
      scratch_size = std::max(scratch_size, 2 * rows * width);
    }
    elements += width * set.rows;
    kernels.push_back(std::move(of_set));
  }
  if (pieces.empty()) return;
  const auto count = static_cast<int64_t>(pieces.size());
  threads = std::max(1, worthwhile_threads(threads, count, elements));
  std::vector<float> scratch(static_cast<size_t>(scratch_size * threads));
  run_chunks(count, threads, [&](int64_t index, int thread) {
    const Piece& piece = pieces[static_cast<size_t>(index)];
    run_piece(piece, kernels[piece.kernels], scratch.data() + thread * scratch_size);
  });
}

}  // namespace

void prox_sgd_rows(const std::vector<RowSet>& sets, const std::vector<Options>& options,
                   int threads) {
  run<float>(sets, options, threads);
  run<double>(sets, options, threads);
}

}  // namespace prox_sgd::cpu
