// The parameter of the CUDA kernels of coupled rows, and the constants that plan and kernel share.
#pragma once

#include "../rows.h"
#include "params.h"

namespace prox_sgd::cuda {

// The order of a sum of squares (docs/architecture.md).
constexpr int kSegment = 512;
constexpr int kLanes = 16;

// What a block keeps of its elements in shared memory, in the compute type, and how many segments'
// sums: four blocks fit into the 100 KiB of an SM of compute capability 8.6.
constexpr int kHeldBytes = 20480;
constexpr int kMostSums = 256;

template <typename C>
constexpr int kMostHeld = static_cast<int>(kHeldBytes / sizeof(C));

static_assert(kMostHeld<float> % kSegment == 0 && kMostHeld<double> % kSegment == 0,
              "a part of a row is whole segments");

// A parameter in the table, as Operands. Without momentum, its buffer's address is the parameter's.
// In a set that has starts, null stands for a start of zeros.
struct MemberEntry {
  void* param;
  const void* grad;
  void* momentum_buffer;
  void* master_param;
  const void* start;
  int64_t* num_zeros;
  int64_t width : 48;
  int64_t group : 16;
};

// A set in the table. A block takes a piece of it: some rows of all its members, or one row that is
// too long to be held, in parts.
struct SetEntry {
  const double* weights;
  double weight;
  double lasso;
  int64_t rows;
  int32_t first_piece;
  int32_t piece_rows;  // 0: one row in parts
  int32_t first_member;
  int32_t members;
  int64_t unused;
};

// Sets come first, then all members.
union RowSlot {
  SetEntry set;
  MemberEntry member;
};

static_assert(sizeof(SetEntry) == 56 && sizeof(MemberEntry) == 56, "slots have one size");

template <typename C>
constexpr int kRowSlots = static_cast<int>((kLargeTable - sizeof(Header<C>)) / sizeof(RowSlot));

template <typename C>
struct RowTable {
  Header<C> header;  // its count is that of sets
  RowSlot slots[kRowSlots<C>];
};

static_assert(sizeof(RowTable<float>) <= PROX_SGD_PARAMETER_BYTES, "table too large");
static_assert(sizeof(RowTable<double>) <= PROX_SGD_PARAMETER_BYTES, "table too large");

// The address by which the CUDA runtime knows a storage's kernel of coupled rows, towards zero or
// for sets that have starts; null for a table of another size than the kernel's.
const void* row_kernel_address(Storage storage, bool towards_start, size_t table_bytes);

}  // namespace prox_sgd::cuda
