// da8w4_quantize_weight: it stays within its operands, fits better than codes from end to end, and finds the same with
// any number of threads and in any floating-point mode. That it finds what numpy finds is tests/weights/test_search.py.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "floats.h"
#include "guarded.h"
#include "harness.h"

namespace check {
namespace {

// A float weight, and all arrays that its quantization may write.
struct Search {
    da8w4_quantization call;
    std::vector<float> importance;
    Guarded values, codes, scales, zps, offsets, sub_scales, sub_offsets;

    Search(Random random, bool at_end) : call{} {
        call.n = 1 + random.below(9);
        call.k = 1 + random.below(150);
        call.group = random.one_in(4) ? call.k : 4 * (1 + random.below(20));
        call.super = random.one_in(2) ? 1 + random.below(9) : 0;
        call.values_type = static_cast<da8w4_type>(random.below(3));
        call.values_stride = (call.k + random.below(2) * random.below(9)) * size_of(call.values_type);
        call.zeros = static_cast<da8w4_zeros>(random.below(3));
        const size_t groups = (call.k + call.group - 1) / call.group;
        const size_t super = std::min(call.super, groups), floats = super ? (groups + super - 1) / super : groups;
        values = Guarded((call.n - 1) * call.values_stride + call.k * size_of(call.values_type), at_end);
        codes = Guarded(call.n * call.k, at_end);
        scales = Guarded(call.n * floats * sizeof(float), at_end);
        zps = Guarded(call.zeros == DA8W4_ZEROS_INTEGER ? call.n * groups : 0, at_end);
        offsets = Guarded(call.zeros == DA8W4_ZEROS_FLOAT ? call.n * floats * sizeof(float) : 0, at_end);
        sub_scales = Guarded(super ? call.n * groups : 0, at_end);
        sub_offsets = Guarded(super && call.zeros == DA8W4_ZEROS_FLOAT ? call.n * groups : 0, at_end);
        const float shift = random.uniform(-1, 1), size = std::exp(random.uniform(-20, 20));
        for (size_t n = 0; n < call.n; n++)
            for (size_t k = 0; k < call.k; k++)
                put(values.as() + n * call.values_stride + k * size_of(call.values_type),
                    size * (random.uniform(-1, 1) + shift) * (call.values_type == DA8W4_F16 ? 1e-5f : 1.0f),
                    call.values_type);
        if (random.one_in(3))
            for (size_t k = 0; k < call.k; k++) importance.push_back(random.one_in(5) ? 0 : random.uniform(0, 1));
        call.values = values.as();
        call.importance = importance.empty() ? nullptr : importance.data();
        call.codes = codes.as();
        call.scales = scales.as<float>();
        call.zps = zps.as<int8_t>();
        call.offsets = offsets.as<float>();
        call.sub_scales = sub_scales.as();
        call.sub_offsets = sub_offsets.as<int8_t>();
    }

    std::vector<std::vector<uint8_t>> found() const {
        return {codes.copy(), scales.copy(), zps.copy(), offsets.copy(), sub_scales.copy(), sub_offsets.copy()};
    }
};

void check_search(const Trial &trial) {
    now(nullptr, "quantize_weight");
    Random random = trial.random.child("modes");
    Search one(trial.random, true), other(trial.random, false);
    da8w4_set_num_threads(1);
    expect(da8w4_quantize_weight(&one.call) == DA8W4_OK, "a good weight is refused");
    da8w4_set_num_threads(1 + random.below(4));
    FloatMode mode(true);
    const da8w4_status status = da8w4_quantize_weight(&other.call);
    expect(mode.restore(), "the caller's floating-point mode was changed");
    expect(status == DA8W4_OK, "%s", da8w4_status_text(status));
    expect(one.found() == other.found(), "threads or floating-point modes change what is found");
    bool codes = true, scales = true;
    for (const uint8_t code : one.codes.copy()) codes = codes && code < 16;
    for (size_t i = 0; i < one.scales.copy().size() / sizeof(float); i++)
        scales = scales && std::isfinite(one.call.scales[i]) &&
                 as_type(one.call.scales[i], DA8W4_BF16) == one.call.scales[i];
    expect(codes, "a code is out of range");
    expect(scales, "a scale is no finite bfloat16");
}

// What is refused, each a good call with one thing damaged.
void check_bad_search(const Trial &trial) {
    struct Damage {
        const char *what;
        da8w4_status status;
        void (*damage)(Search &);
    };
    const Damage all[] = {
        {"n 0", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.n = 0; }},
        {"k 0", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.k = 0; }},
        {"group 0", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.group = 0; }},
        {"group 6", DA8W4_BAD_GROUP, [](Search &s) { s.call.group = s.call.k == 6 ? 10 : 6; }},
        {"no values", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.values = nullptr; }},
        {"a short stride", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.values_stride = s.call.k; }},
        {"values of bytes", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.values_type = DA8W4_U8; }},
        {"unknown zeros", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.zeros = static_cast<da8w4_zeros>(3); }},
        {"no codes", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.codes = nullptr; }},
        {"no scales", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.scales = nullptr; }},
        {"no zero points", DA8W4_BAD_ARGUMENT,
         [](Search &s) { s.call.zeros = DA8W4_ZEROS_INTEGER, s.call.zps = nullptr; }},
        {"no offsets", DA8W4_BAD_ARGUMENT,
         [](Search &s) { s.call.zeros = DA8W4_ZEROS_FLOAT, s.call.offsets = nullptr; }},
        {"no second level", DA8W4_BAD_ARGUMENT, [](Search &s) { s.call.super = 2, s.call.sub_scales = nullptr; }},
        {"negative importance", DA8W4_BAD_ARGUMENT,
         [](Search &s) { s.importance.assign(s.call.k, -1), s.call.importance = s.importance.data(); }},
        {"importance without end", DA8W4_BAD_ARGUMENT,
         [](Search &s) { s.importance.assign(s.call.k, INFINITY), s.call.importance = s.importance.data(); }},
        {"a NaN", DA8W4_NOT_FINITE, [](Search &s) { put(s.values.as(), NAN, s.call.values_type); }},
        {"infinity", DA8W4_NOT_FINITE,
         [](Search &s) {
             put(s.values.as() + (s.call.n - 1) * s.call.values_stride + (s.call.k - 1) * size_of(s.call.values_type),
                 -INFINITY, s.call.values_type);
         }},
    };
    for (const Damage &one : all) {
        now(nullptr, "quantize_weight with %s", one.what);
        Search search(trial.random, true);
        one.damage(search);
        expect(da8w4_quantize_weight(&search.call) == one.status, "it is not refused as it should be");
    }
    expect(da8w4_quantize_weight(nullptr) == DA8W4_BAD_ARGUMENT, "a null pointer is taken");
}

}  // namespace

std::vector<Test> search_tests() {
    return {
        {"search", "random float weights", 400, 8, false, check_search},
        {"bad_search", "float weights with one thing damaged", 4, 1, false, check_bad_search},
    };
}

}  // namespace check
