// The numbers of gates: docs/numbers.md has the formulas. Float32 throughout.
#pragma once

#include <stdint.h>

namespace da8w4 {

// exp(-z) = 2^n * exp(-r), where n is the integer next to -z / ln 2 and r = z + n * ln 2. Adding kRound to a float
// rounds it, and leaves its integer in the lowest bits.
constexpr float kMinusLog2E = -0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e43p-1f, kLn2Low = -0x1.05c61p-29f;
constexpr float kRound = 0x1.8p+23f;

// exp(-r) = 1 + r * (-1 + kExp[0] * r + ... + kExp[4] * r^5), by a minimax fit of the relative error where |r| <= ln 2
// / 2, coefficient by coefficient rounded to float32: 2^-28.2.
constexpr float kExp[] = {0x1.fffffcp-2f, -0x1.555492p-3f, 0x1.5558acp-5f, -0x1.123974p-7f, 0x1.6a504cp-10f};

// The z of a sigmoid. Above, 1 + exp(-z) is 1; below, whatever sigmoid(z) is multiplied by here becomes 0. Both keep n
// within what the exponents of two floats hold.
constexpr float kLowestZ = -174, kHighestZ = 87;
constexpr uint32_t kOneBits = 0x3f800000;   // 2^0
constexpr uint32_t kMostBits = 0x7e800000;  // 2^126: times exp(-r) and plus 1, still finite

}  // namespace da8w4
