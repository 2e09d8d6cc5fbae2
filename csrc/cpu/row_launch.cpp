// Runs sets of coupled rows on threads, in pieces of some rows of all parameters of a set.
#include <algorithm>
#include <utility>
#include <vector>

#include "../math/row_factor.h"
#include "../math/update.h"
#include "../rows.h"
#include "rows.h"
#include "threads.h"

namespace prox_sgd::cpu {
namespace {

// What is read again to be scaled stays in a core's cache. Long pieces read long runs of memory.
constexpr int64_t kPieceElements = 65536;
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

// What updates and scales one member's rows; `ridge` is the factor r, which comes last.
template <typename C>
struct MemberKernel {
  MemberKernel(const Options& options, Storage storage, bool towards_start) {
    Options without_ridge = options;
    if (options.proximal) without_ridge.weight_decay = 0.0;
    c = coefficients<C>(without_ridge);
    ridge = coefficients<C>(options).scale;
    lr = options.lr;
    kernels = row_kernels_for(storage, c.mode, simplest_form(c), towards_start);
  }

  Coefficients<C> c;
  double ridge;
  double lr;
  RowKernels kernels;
};

// Rows of one member: its arrays from the first of them on, and what is scaled.
struct Rows {
  Operands at;
  void* weights;
};

Rows rows_of(const RowMember& member, const Piece& piece, const RowKernels& kernels,
             float* scratch) {
  const Operands& o = member.operands;
  const int64_t first = piece.begin * member.width;
  const auto from = [&](void* array, int64_t size) -> void* {
    return array == nullptr ? nullptr : static_cast<char*>(array) + first * size;
  };
  Rows rows{};
  rows.at.param = from(o.param, kernels.param_size);
  rows.at.grad = static_cast<const char*>(o.grad) + first * kernels.param_size;
  rows.at.momentum_buffer = from(o.momentum_buffer, kernels.momentum_size);
  rows.at.master_param = from(o.master_param, kernels.weight_size);
  if (o.start != nullptr) {
    rows.at.start = static_cast<const char*>(o.start) + first * kernels.start_size;
  }
  rows.weights = rows.at.master_param != nullptr ? rows.at.master_param : rows.at.param;
  if (kernels.needs_scratch) rows.weights = scratch;
  return rows;
}

// Turns the sum of squares of each row of a piece into its factor.
void to_factors(double* sums, const Piece& piece, double lr) {
  const RowSet& set = *piece.set;
  for (int64_t row = 0; row < piece.end - piece.begin; ++row) {
    const double weight = set.weights == nullptr ? set.weight : set.weights[piece.begin + row];
    sums[row] = row_factor(sums[row], row_threshold(lr, set.lasso, weight));
  }
}

// `scratch`: room for the piece's elements where a kernel needs it.
template <typename C>
void run_piece(const Piece& piece, const std::vector<MemberKernel<C>>& members, float* scratch) {
  const RowSet& set = *piece.set;
  const int64_t count = piece.end - piece.begin;
  double factors[kMaxPieceRows] = {};
  float* own = scratch;
  for (size_t n = 0; n < set.members.size(); ++n) {
    const int64_t width = set.members[n].width;
    const Rows rows = rows_of(set.members[n], piece, members[n].kernels, own);
    members[n].kernels.update(rows.at, &members[n].c, rows.weights, count, width, factors);
    own += count * width;
  }
  to_factors(factors, piece, members.front().lr);
  own = scratch;
  for (size_t n = 0; n < set.members.size(); ++n) {
    const int64_t width = set.members[n].width;
    int64_t* const num_zeros = set.members[n].operands.num_zeros;
    const Rows rows = rows_of(set.members[n], piece, members[n].kernels, own);
    const int64_t zeros = members[n].kernels.scale(rows.at, rows.weights, count, width, factors,
                                                   members[n].ridge, num_zeros != nullptr);
    if (num_zeros != nullptr) __atomic_fetch_add(num_zeros, zeros, __ATOMIC_RELAXED);
    own += count * width;
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
      const bool towards_start = member.operands.start != nullptr;
      of_set.emplace_back(options[member.options], set.storage, towards_start);
    }
    const int64_t width = width_of(set);
    const int64_t rows = rows_of_a_piece(width, set.rows);
    for (int64_t begin = 0; begin < set.rows; begin += rows) {
      pieces.push_back({&set, kernels.size(), begin, std::min(begin + rows, set.rows)});
    }
    if (of_set.front().kernels.needs_scratch) {
      scratch_size = std::max(scratch_size, rows * width);
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
    float* const own = scratch_size == 0 ? nullptr : scratch.data() + thread * scratch_size;
    run_piece(piece, kernels[piece.kernels], own);
  });
}

}  // namespace

void prox_sgd_rows(const std::vector<RowSet>& sets, const std::vector<Options>& options,
                   int threads) {
  run<float>(sets, options, threads);
  run<double>(sets, options, threads);
}

}  // namespace prox_sgd::cpu
