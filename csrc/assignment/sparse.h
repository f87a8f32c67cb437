// Auction on short candidate lists, finished exactly: large matrices without heavy ties.
#pragma once

#include "assignment/dense.h"
#include "common/cpu.h"

namespace ffmerge {

// The smallest matrix it takes.
constexpr int kSparseSmallest = 64;

// Solves the problem and returns true, or stops early on input it is slow for (heavy ties, extreme scales, NaN) and
// returns false; `matching` and `range` are then undefined. Extra memory: about 600 bytes a row.
bool assignment_solve_sparse(const ScoreView<float>& scores, Isa isa, Matching& matching, ScoreRange& range);

}  // namespace ffmerge
