// Executes a mixture of experts: which rows each expert has, its two products, and the sums of its results.
#pragma once

#include "gemm/problem_list.h"

namespace da8w4 {

// A round has at least so many tokens, if there are so many.
constexpr size_t kLeastRoundTokens = 256;
// So that int32 counts the slot rows of a round.
constexpr size_t kMostSlots = INT32_MAX / kLeastRoundTokens;

// Slots are sorted by their experts, and in the order of tokens for each; a slot row is the place of one in that order.
struct MoePlan {
    ProductPlan gate_up, down;
    size_t round_tokens;  // that are done in one parallel region

    // Shared.
    Scratch<size_t> starts;     // [experts]: where the slot rows of each begin; counts, at first
    Scratch<int32_t> row_of;    // [token][slot]: its slot row, or -1
    Scratch<int32_t> token_of;  // [slot row], counted from the first token of the round
    Scratch<Problem> gate_up_problems, down_problems;
    RowsPlan tokens;         // quantized for the first product
    RowsPlan slot_rows;      // quantized for the second product
    Scratch<float> hidden;   // [slot row][inputs of down]
    Scratch<float> results;  // [2][slot row][stripe_outputs blocks]
    size_t stripe_outputs;   // output blocks of down that are multiplied and added before the next ones

    // In the thread's memory.
    RowsPlan private_tokens;     // instead of tokens, where they are few
    RowsPlan item_rows;          // of a work item of the first product
    RowsPlan private_slot_rows;  // of a work item of the second product, where it has few
    QuantizeScratch quantize_tokens, quantize_slots;

    size_t shared_bytes, thread_bytes;
};
MoePlan plan_moe(const Product &gate_up, const Product &down, const Kernel &kernel, size_t experts, size_t tokens,
                 size_t slots);

void mix_experts(const da8w4_moe_call &call, const Kernel &kernel, const MoePlan &plan, size_t threads);

}  // namespace da8w4
