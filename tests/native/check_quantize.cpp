// da8w4_quantize_rows: every row of "scalar" against docs/numbers.md, every other kernel against "scalar".
#include "activations.h"
#include "floats.h"
#include "harness.h"
#include "oracle.h"

namespace check {
namespace {

const size_t all_k[] = {1, 3, 4, 5, 31, 64, 65, 130, 260, 600, 1100};

// Rows of floats, and how they are to be quantized.
struct Input {
    size_t m, k;
    da8w4_type type;
    da8w4_scheme scheme;
    bool at_end;
    size_t x_stride, act_stride;
    std::vector<uint8_t> x;
};

Input random_input(Random &random, size_t m, size_t k, da8w4_type type, da8w4_scheme scheme) {
    Input in = {m, k, type, scheme, !random.one_in(4), 0, 0, {}};
    in.x_stride = (k + random.below(2) * random.below(40)) * size_of(type);
    in.act_stride = k + random.below(2) * random.below(40);
    in.x = random_floats(random, m, k, in.x_stride, type);
    return in;
}

struct Output {
    std::vector<uint8_t> act;  // rows with a stride, gaps included
    std::vector<uint8_t> scales, zps;

    float scale(size_t row) const { return get(&scales[row * sizeof(float)], DA8W4_F32); }
    int32_t zp(size_t row) const {
        int32_t value;
        memcpy(&value, &zps[row * sizeof value], sizeof value);
        return value;
    }
};

// The call with a number of threads and a mode of its own, or its time.
Output quantize(Random random, const char *kernel, const Input &in, const Guarded &x) {
    const size_t threads = timing() ? 1 : 1 + random.below(4);
    const bool hostile = !timing() && random.one_in(4);
    now(kernel, "quantize_rows m=%zu k=%zu x=%s%s x_stride=%zu act_stride=%zu threads=%zu%s%s", in.m, in.k,
        name_of(in.type), in.scheme == DA8W4_ACT_INT8 ? " int8" : "", in.x_stride, in.act_stride, threads,
        in.at_end ? "" : ", operands at the start of a page", hostile ? ", rounding upward" : "");
    da8w4_set_num_threads(threads);
    const Guarded act(in.m ? (in.m - 1) * in.act_stride + in.k : 0, in.at_end), scales(in.m * sizeof(float), in.at_end),
        zps(in.m * sizeof(int32_t), in.at_end);
    const auto call = [&] {
        return da8w4_quantize_rows(kernel, x.as(), in.type, in.x_stride, in.m, in.k, in.scheme, act.as(), in.act_stride,
                                   scales.as<float>(), zps.as<int32_t>());
    };
    if (timing()) {
        time_call([&] { (void)call(); });
        return {};
    }
    FloatMode mode(hostile);
    const da8w4_status status = call();
    expect(mode.restore(), "the caller's floating-point mode was changed");
    expect(status == DA8W4_OK, "%s", da8w4_status_text(status));
    return {act.copy(), scales.copy(), zps.copy()};
}

// The number of a row that is not what docs/numbers.md says, or whose gap was written; m if there is none.
size_t wrong_row(const Input &in, const Output &out) {
    for (size_t r = 0; r < in.m; r++) {
        const Row want = quantized(floats_at(&in.x[r * in.x_stride], in.k, in.type), in.scheme, in.k);
        bool same = same_bits(out.scale(r), want.scale) && out.zp(r) == want.zp;
        const size_t begin = r * in.act_stride;
        for (size_t k = 0; k < in.k; k++) same = same && out.act[begin + k] == static_cast<uint8_t>(want.act[k]);
        for (size_t i = begin + in.k; r + 1 < in.m && i < begin + in.act_stride; i++)
            same = same && out.act[i] == Guarded::garbage(i);
        if (!same) return r;
    }
    return in.m;
}

void check_rows(const Random &random, size_t m, size_t k, da8w4_type type, da8w4_scheme scheme) {
    Random draws = random.child("input");
    const Input in = random_input(draws, m, k, type, scheme);
    const Guarded x(in.x, in.at_end);
    if (timing()) {
        for (const std::string &kernel : kernels_and_scalar()) quantize(random, kernel.c_str(), in, x);
        return;
    }
    const Output want = quantize(random.child("scalar"), "scalar", in, x);
    if (scalar_wanted()) {
        const size_t wrong = wrong_row(in, want);
        expect(wrong == m, "row %zu is not quantized as docs/numbers.md says", wrong);
    }
    for (const std::string &kernel : kernels()) {
        const Output mine = quantize(random.child(kernel.c_str()), kernel.c_str(), in, x);
        expect(mine.act == want.act && mine.zps == want.zps && mine.scales == want.scales,
               "rows are not quantized as scalar does");
    }
}

// Each k with each type and scheme.
void check_quantize(const Trial &trial) {
    const size_t k = all_k[trial.index / 6];
    const da8w4_type type = static_cast<da8w4_type>(trial.index % 3);
    const da8w4_scheme scheme = static_cast<da8w4_scheme>(trial.index / 3 % 2);
    for (size_t m = 0; m <= 20; m++) {
        const Random random = trial.random.child(uint64_t{m});
        if (!trial.quick || random.child("quick").one_in(6)) check_rows(random, m, k, type, scheme);
    }
}

// So many rows, and so long ones, that several threads share them.
void check_many_rows(const Trial &trial) {
    const size_t shapes[][2] = {{240, 1100}, {5, 100003}, {700, 601}, {3, 262144}};
    const size_t *shape = shapes[trial.index / 2];
    Random random = trial.random;
    const da8w4_type type = static_cast<da8w4_type>(random.below(3));
    check_rows(random, shape[0], shape[1], type, static_cast<da8w4_scheme>(trial.index % 2));
}

}  // namespace

std::vector<Test> quantize_tests() {
    return {
        {"quantize", "rows of each type, from 1 to 1100 long", 6 * std::size(all_k), 1, true, check_quantize},
        {"quantize_many", "rows that several threads share", 8, 1, true, check_many_rows},
    };
}

}  // namespace check
