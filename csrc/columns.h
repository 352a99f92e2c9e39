// Columns of a BankStats's tables, for all of csrc/. Must agree with COUNTS, SUMS and RECORD in kernels/records.py.
#pragma once

namespace sedetect {

enum CountColumn { kRows, kFirstRows, kNonfinite, kOverFp16, kOverFp8, kCounts };
enum SumColumn { kGateSum, kGateFirstSum, kNormSum, kSqnormSum, kGateNormSum, kSums };
enum Column { kValue, kSign, kChannel, kSource, kSequence, kPosition, kToken, kGate, kInValue, kInChannel, kColumns };

}  // namespace sedetect
