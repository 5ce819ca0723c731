// The numbers of gates: docs/numbers.md has the formulas. Float32 throughout.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace da8w4 {

// exp(-z) = 2^n * exp(-r), where n is the integer next to -z / ln 2 and r = z + n * ln 2. Adding kRound to a float
// rounds it, and leaves its integer in the lowest bits.
constexpr float kMinusLog2E = -0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e43p-1f, kLn2Low = -0x1.05c61p-29f;
constexpr float kRound = 0x1.8p+23f;

// exp(-r) - 1 = r^2 * polynomial(r) - r, here as below with the highest coefficient first, by a minimax fit of the
// relative error of exp(-r) where |r| <= ln 2 / 2, in which coefficients were rounded to float32 one after the other:
// 2^-28.2.
constexpr size_t kExpTerms = 5;
constexpr float kExp[kExpTerms] = {0x1.6a504cp-10f, -0x1.123974p-7f, 0x1.5558acp-5f, -0x1.555492p-3f, 0x1.fffffcp-2f};

// The z of a sigmoid. Above, 1 + exp(-z) is 1; below, what sigmoid(z) is multiplied by here becomes 0.
constexpr float kLowestZ = -150, kHighestZ = 87;
// Where n exceeds 100, 2^100 takes the place of 2^n, and 2^(100 - n) that of 1.
constexpr uint32_t kOneBits = 0x3f800000, kMostBits = 0x71800000;

// GELU: t * erfc(t / sqrt(2)) / 2 = M(t) * exp(-k * t^2), where k is 0 below t = 1 and then 1/2. M is a polynomial of
// t - center in each of 8 pieces: by such fits, from 2^-26.6 to 2^-33.5. The centers are floats at which M is nearly
// one. Piece (bits of (t + 1)) >> 22 & 7: 1..2, 2..3, 3..5, 5..7, 7..11, from 11 on, 0..0.5, 0.5..1. From 14.37 on, the
// result is 0.
constexpr float kMostT = 0x1.cbd70ap+3f;
constexpr size_t kPieces = 8, kGeluTerms = 8;
constexpr float kGeluK[kPieces] = {0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0};
constexpr float kGeluCenters[kPieces] = {
    0x1.8000f8p+0f, 0x1.400134p+1f, 0x1.00029cp+2f, 0x1.800172p+2f, 0x1.2002cap+3f, 0x1.9ccf4p+3f, 0, 0x1.800236p-1f};
constexpr float kGelu[kGeluTerms][kPieces] = {
    {0x1.de18e2p-13f, 0x1.c3539p-16f, 0x1.14a492p-19f, 0x1.090cecp-23f, 0x1.85f4fcp-28f, 0x1.2441acp-32f,
     0x1.f0fa6ap-10f, 0x1.67cea6p-9f},
    {-0x1.85ece2p-11f, -0x1.b6bc76p-14f, -0x1.4bbcb8p-17f, -0x1.9e758ap-21f, -0x1.9d0836p-25f, -0x1.ac1dfcp-29f,
     -0x1.6f4b64p-7f, 0x1.34b36ep-9f},
    {0x1.21643ep-9f, 0x1.880ba2p-12f, 0x1.63e0e6p-15f, 0x1.2cd148p-18f, 0x1.85bedap-22f, 0x1.262962p-25f,
     0x1.a70a0cp-12f, -0x1.75fa4cp-6f},
    {-0x1.9ea416p-8f, -0x1.514898p-10f, -0x1.88a48cp-13f, -0x1.b5fb64p-16f, -0x1.8b5106p-19f, -0x1.9b70c4p-22f,
     0x1.1011bcp-4f, 0x1.37a2dcp-8f},
    {0x1.0d5facp-6f, 0x1.0abee2p-8f, 0x1.94331cp-11f, 0x1.2ca778p-13f, 0x1.7daf56p-16f, 0x1.12d13ap-18f,
     0x1.5a4dbcp-18f, 0x1.090064p-3f},
    {-0x1.331f1cp-5f, -0x1.7899e6p-7f, -0x1.78f1dp-9f, -0x1.7b54dp-11f, -0x1.54a2aap-13f, -0x1.560354p-15f,
     -0x1.98845cp-2f, -0x1.bb42cep-3f},
    {0x1.203f0ep-4f, 0x1.bf3614p-6f, 0x1.2dd24cp-7f, 0x1.a0ea9ap-9f, 0x1.0b668ep-10f, 0x1.784232p-12f, 0x1p-1f,
     0x1.921ddap-11f},
    {0x1.3c1486p-2f, 0x1.69cf2ap-2f, 0x1.82b51ep-2f, 0x1.8e012p-2f, 0x1.93a666p-2f, 0x1.961ae8p-2f, 0, 0x1.5c1982p-3f},
};
constexpr uint32_t kMinus64Bits = 0xdf800000;  // -2^64: 2^n alone may be too small for a float

// GELU by tanh: x * sigmoid(z), z = x * (c + d * x^2), where c = sqrt(8 / pi) and d = 0.044715 * c, each of two floats.
// The upper one of c has 20 bits, so that c - fma(x^2, d, c) is exact.
constexpr float kTanhC = 0x1.98846p+0f, kTanhCLow = -0x1.985794p-21f;
constexpr float kTanhD = 0x1.2444f2p-4f, kTanhDLow = 0x1.49b16ap-29f;
constexpr float kLowestTanhX = -11, kHighestTanhX = 9.5f;  // beyond, sigmoid(z) is 0 or 1 in effect

// swigluoai: gates below only matter where alpha is below 2^-50.
constexpr float kLowestGate = -0x1p+60f;
constexpr float kMostLow = 0x1p-16f;  // |alpha * gate - z|, where z is not clamped

}  // namespace da8w4
