// Products of random activations with a weight, by every kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "guarded.h"
#include "oracle.h"
#include "pyda8w4/pyda8w4.h"
#include "weight.h"

namespace check {

// What a product takes beside the weight.
struct Operands {
    size_t m;
    bool linear;          // floats for da8w4_linear, else bytes for da8w4_gemm
    da8w4_scheme scheme;  // of bytes UINT8 or INT8, which is their type
    bool in_order;        // the activations are permuted already
    bool at_end;
    da8w4_type act_type, out_type;
    std::vector<uint8_t> act;
    size_t act_stride, out_stride, out_bytes;
    std::vector<float> scales, bias;  // empty: none
    std::vector<int32_t> zps;
};

Operands random_operands(Random &random, const Matrix &matrix, size_t m, bool linear);

// The rows that the product multiplies, as docs/numbers.md quantizes them or as they are.
std::vector<Row> rows_of(const Operands &operands, const Matrix &matrix);

// A product with its operands in guarded memory. Each run has an output and a workspace of its own. Bytes multiply the
// weight without its factors and its rotation, which belong to floats.
class Product {
public:
    Product(const Operands &operands, const Weight &weight);
    Product(const Product &) = delete;
    Product &operator=(const Product &) = delete;

    // Returns the output, gaps included. The number of threads and the mode come from `random`.
    std::vector<uint8_t> run(Random random, const char *kernel) const;
    void time(const char *kernel) const;

    da8w4_status status(const da8w4_call &call) const {
        return operands.linear ? da8w4_linear(&call) : da8w4_gemm(&call);
    }
    const da8w4_call &call() const { return call_; }

    const Operands &operands;
    const Weight &weight;

private:
    void describe(const char *kernel, size_t threads, const char *mode) const;

    Guarded act_, scales_, zps_, bias_;
    da8w4_packed packed_;
    da8w4_call call_ = {};
};

// Expects that a workspace of `bytes` is refused.
void expect_too_small(const Product &product, da8w4_call call, size_t bytes);

// Compares each kernel with "scalar", and "scalar" with docs/numbers.md; or times each.
void check_product(const Random &random, const Weight &weight, const Operands &operands);

// These do the same with operands that they draw: for da8w4_linear or da8w4_gemm, or for one of them by chance.
void check_product(const Random &random, const Weight &weight, size_t m, bool linear);
void check_either_product(const Random &random, const Weight &weight, size_t m);

}  // namespace check
