// Auction on short candidate lists, finished exactly: large matrices without heavy ties.
#pragma once

#include "assignment_dense.h"
#include "common/cpu.h"

namespace ffmerge {

// The smallest matrix it takes, and the largest magnitude of a score (float32 prices must not overflow).
constexpr int kSparseSmallest = 64;
constexpr float kSparseLargest = 1e30f;

// Solves the problem and returns true, or stops early on input it is slow for and returns false; `matching` is then
// undefined. Extra memory: about 600 bytes a row.
bool assignment_solve_sparse(const ScoreView<float>& scores, Isa isa, Matching& matching);

}  // namespace ffmerge
