// The C interface: each function checks its arguments, chooses a kernel, plans and executes.
#include <string.h>

#include <limits>

#include "gemm/driver.h"
#include "gemm/experts.h"
#include "gemm/explanation.h"
#include "kernels/limits.h"
#include "kernels/registry.h"
#include "packing/layout.h"
#include "packing/pack.h"
#include "packing/quantize.h"
#include "packing/rotation.h"
#include "runtime/cpu.h"
#include "runtime/parallel.h"

using namespace da8w4;

namespace {

// Values that are worth a thread when rows are quantized.
constexpr size_t kMinValuesPerThread = 1 << 17;

bool valid_group(size_t group, size_t k) { return group && (group % kQuad == 0 || group == k); }

bool is_kind(da8w4_kind kind) { return kind >= DA8W4_INT4 && kind <= DA8W4_TABLE4; }
bool is_sub_type(da8w4_type type) { return type == DA8W4_U8 || type == DA8W4_S8; }

// Whether codes of this kind can come in this format.
bool fits(da8w4_kind kind, da8w4_codes format) {
    switch (format) {
        case DA8W4_CODES_UNSIGNED: return kind != DA8W4_INT8;
        case DA8W4_CODES_SIGNED: return kind != DA8W4_TABLE4;
        case DA8W4_CODES_LOW_FIRST:
        case DA8W4_CODES_HIGH_FIRST: return kind == DA8W4_INT4 || kind == DA8W4_TABLE4;
    }
    return false;
}

// What a weight and a packed weight have alike: all that their kind and two levels take, and no table without use.
template <class Weight>
bool has_parts(const Weight &weight) {
    if (!is_kind(weight.kind) || (weight.kind == DA8W4_TABLE4) != (weight.table != nullptr)) return false;
    if (!weight.super) return true;
    if (!weight.sub_scales || !is_sub_type(weight.sub_scale_type)) return false;
    return !weight.offsets || (weight.sub_offsets && is_sub_type(weight.sub_offset_type));
}

bool valid(const da8w4_weight *weight) {
    return weight && weight->n && weight->k && weight->group && weight->scales && has_parts(*weight) &&
           fits(weight->kind, weight->format);
}

bool valid(const da8w4_packed *weight) {
    return weight && weight->n && weight->k && weight->group <= weight->k && valid_group(weight->group, weight->k) &&
           has_parts(*weight) && is_float(weight->scale_type) && weight->codes && weight->scales &&
           (!weight->rotation || is_rotation(weight->rotation));
}

bool valid(const da8w4_quantization *weight) {
    if (!weight || !weight->n || !weight->k || !weight->group || !weight->values || !is_float(weight->values_type) ||
        weight->values_stride < weight->k * size_of(weight->values_type) || !weight->codes || !weight->scales)
        return false;
    if (weight->importance)
        for (size_t k = 0; k < weight->k; k++)
            if (!(weight->importance[k] >= 0 && weight->importance[k] <= std::numeric_limits<float>::max()))
                return false;
    const bool two_levels = weight->super != 0;
    switch (weight->zeros) {
        case DA8W4_ZEROS_NONE: return !two_levels || weight->sub_scales;
        case DA8W4_ZEROS_INTEGER: return weight->zps && (!two_levels || weight->sub_scales);
        case DA8W4_ZEROS_FLOAT: return weight->offsets && (!two_levels || (weight->sub_scales && weight->sub_offsets));
    }
    return false;
}

size_t row_bytes(const da8w4_weight &weight) {
    const bool nibbles = weight.format == DA8W4_CODES_LOW_FIRST || weight.format == DA8W4_CODES_HIGH_FIRST;
    return nibbles ? ceil_div(weight.k, 2) : weight.k;
}

bool is_scheme(da8w4_scheme scheme) { return scheme >= DA8W4_ACT_UINT8 && scheme <= DA8W4_ACT_INT16; }

bool is_activation(da8w4_activation activation) { return activation >= DA8W4_SILU && activation <= DA8W4_SWIGLUOAI; }

// Whether the columns of a product can be gates and ups.
bool fits(const da8w4_gating *gating, size_t n) { return !gating || (is_activation(gating->activation) && n % 2 == 0); }

Product product_of(const da8w4_packed &weight, da8w4_type act_type, da8w4_scheme scheme, const da8w4_gating *gating) {
    return {
        .n = weight.n,
        .grouping = {.k = weight.k, .group = weight.group},
        .has_offsets = weight.offsets != nullptr,
        .transforms = is_float(act_type) && (weight.perm || weight.factors || weight.rotation),
        .scheme = is_float(act_type) ? scheme : DA8W4_ACT_UINT8,
        .columns = !gating               ? Columns::outputs
                   : gating->interleaved ? Columns::pairs
                                         : Columns::halves,
    };
}

// What all weights of a call share, because one plan serves them.
bool are_alike(const da8w4_packed &a, const da8w4_packed &b) {
    return a.n == b.n && a.k == b.k && a.group == b.group && a.kind == b.kind && !a.offsets == !b.offsets &&
           !a.perm == !b.perm && !a.factors == !b.factors && a.rotation == b.rotation;
}

bool valid_product(const da8w4_packed *weight) { return valid(weight) && weight->sums; }

template <class Plan>
struct Planned {
    Plan plan;
    size_t threads;

    size_t workspace_bytes() const { return plan.shared_bytes + threads * plan.thread_bytes; }
};

template <class Call>
size_t threads_of(const Call &call, const Product &product, size_t rows) {
    return useful_threads(product, rows, call.threads ? call.threads : num_threads());
}

template <class Call>
Planned<GroupedPlan> plan_of(const Call &call, const Kernel &kernel, size_t weights, const da8w4_packed &weight) {
    const Product product = product_of(weight, call.act_type, call.scheme, call.gating);
    return {.plan = plan_grouped(product, kernel, weights, call.m), .threads = threads_of(call, product, call.m)};
}

Planned<MoePlan> plan_of(const da8w4_moe_call &call, const Kernel &kernel) {
    const Product gate_up = product_of(*call.gate_up, call.act_type, call.scheme, call.gating);
    const Product down = product_of(*call.down, call.act_type, call.scheme, nullptr);
    return {.plan = plan_moe(gate_up, down, kernel, call.experts, call.m, call.slots),
            .threads = threads_of(call, gate_up, call.m * call.slots)};
}

da8w4_status check_act_zps(const da8w4_call &call) {
    if (!call.act_zps) return DA8W4_OK;
    const int32_t low = call.act_type == DA8W4_U8 ? 0 : INT8_MIN, high = call.act_type == DA8W4_U8 ? 255 : INT8_MAX;
    for (size_t row = 0; row < call.m; row++)
        if (call.act_zps[row] < low || call.act_zps[row] > high) return DA8W4_BAD_ACT_ZP;
    return DA8W4_OK;
}

// What every call has: rows of activations and of outputs, and a workspace.
template <class Call>
bool has_operands(const Call &call, size_t k, size_t outputs) {
    const bool aligned = reinterpret_cast<uintptr_t>(call.workspace) % 64 == 0;
    if (!call.act || !call.out || !call.workspace || !aligned) return false;
    return call.m <= 1 ||
           (call.act_stride >= k * size_of(call.act_type) && call.out_stride >= outputs * size_of(call.out_type));
}

bool valid(const da8w4_call *call) {
    return call && valid_product(call->weight) && is_scheme(call->scheme) && fits(call->gating, call->weight->n);
}

template <class Call>
Source source_of(const Call &call) {
    return {.act = call.act, .type = call.act_type, .stride = call.act_stride, .scales = nullptr, .zps = nullptr};
}

template <class Call>
Operands operands_of(const Call &call, const da8w4_packed *weights) {
    return {.weights = weights,
            .bias = call.bias,
            .gating = call.gating,
            .out = call.out,
            .first_output = 0,
            .out_type = call.out_type,
            .out_stride = call.out_stride};
}

da8w4_status execute(const da8w4_call *call, bool (*takes)(da8w4_type)) {
    if (!valid(call) || !is_float(call->out_type) || !takes(call->act_type)) return DA8W4_BAD_ARGUMENT;
    if (!is_float(call->act_type) && (call->weight->factors || call->weight->rotation))
        return DA8W4_TRANSFORM_NEEDS_FLOATS;
    const Kernel *kernel;
    da8w4_status status = find_kernel(call->kernel, &kernel);
    if (status != DA8W4_OK || call->m == 0) return status;
    const Planned<GroupedPlan> planned = plan_of(*call, *kernel, 1, *call->weight);
    if (!has_operands(*call, call->weight->k, planned.plan.product.product.outputs())) return DA8W4_BAD_ARGUMENT;
    status = is_float(call->act_type) ? DA8W4_OK : check_act_zps(*call);
    if (status != DA8W4_OK) return status;
    if (call->workspace_bytes < planned.workspace_bytes()) return DA8W4_WORKSPACE_TOO_SMALL;
    GroupedCall grouped = {.weights = 1,
                           .rows = call->m,
                           .rows_of_weight = &call->m,
                           .source = source_of(*call),
                           .operands = operands_of(*call, call->weight)};
    grouped.source.scales = call->act_scales;
    grouped.source.zps = call->act_zps;
    multiply_grouped(grouped, *kernel, planned.plan, static_cast<char *>(call->workspace), planned.threads);
    return DA8W4_OK;
}

// ---- experts

bool valid(const da8w4_grouped_call *call) {
    return call && call->experts && valid_product(call->weights) && is_scheme(call->scheme) &&
           is_float(call->act_type) && is_float(call->out_type) && fits(call->gating, call->weights->n);
}

bool valid(const da8w4_moe_call *call) {
    return call && call->experts && call->experts <= INT32_MAX && call->slots <= kMostSlots &&
           valid_product(call->gate_up) && valid_product(call->down) && call->gating &&
           fits(call->gating, call->gate_up->n) && call->gate_up->n == 2 * call->down->k && is_scheme(call->scheme) &&
           is_float(call->act_type) && is_float(call->out_type);
}

// Whether an expert that has rows is like the first one, which every call has checked.
bool valid_expert(const da8w4_packed *weights, size_t expert) {
    return expert == 0 || (valid_product(weights + expert) && are_alike(weights[expert], *weights));
}

}  // namespace

// ---- weights ---------------------------------------------------------------------------------

da8w4_status da8w4_plan_pack(const da8w4_weight *weight, da8w4_packed *packed, da8w4_packed_bytes *bytes) {
    if (!valid(weight) || !packed || !bytes) return DA8W4_BAD_ARGUMENT;
    if (!valid_group(weight->group, weight->k)) return DA8W4_BAD_GROUP;
    return plan_pack(*weight, packed, bytes);
}

da8w4_status da8w4_pack(const da8w4_weight *weight, const da8w4_packed *plan, const da8w4_packed_arrays *to) {
    da8w4_packed checked;
    da8w4_packed_bytes bytes;
    const da8w4_status status = da8w4_plan_pack(weight, &checked, &bytes);
    if (status != DA8W4_OK) return status;
    if (!plan || plan->n != checked.n || plan->k != checked.k || plan->group != checked.group ||
        plan->super != checked.super || plan->kind != checked.kind || plan->scale_type != checked.scale_type || !to ||
        !weight->codes || weight->codes_stride < row_bytes(*weight))
        return DA8W4_BAD_ARGUMENT;
    const da8w4_packed_arrays wanted = {
        .codes = to->codes,
        .scales = to->scales,
        .sub_scales = bytes.sub_scales ? to->sub_scales : nullptr,
        .zps = bytes.zps ? to->zps : nullptr,
        .offsets = bytes.offsets ? to->offsets : nullptr,
        .sub_offsets = bytes.sub_offsets ? to->sub_offsets : nullptr,
        .sums = to->sums,
    };
    if (!wanted.codes || !wanted.scales || !wanted.sums || (bytes.sub_scales && !wanted.sub_scales) ||
        (bytes.zps && !wanted.zps) || (bytes.offsets && !wanted.offsets) || (bytes.sub_offsets && !wanted.sub_offsets))
        return DA8W4_BAD_ARGUMENT;
    return pack(*weight, checked, wanted) ? DA8W4_OK : DA8W4_BAD_CODE;
}

da8w4_status da8w4_unpack(const da8w4_packed *packed, uint8_t *codes, float *scales, int8_t *zps, float *offsets) {
    if (!valid(packed) || !codes || !scales || !zps || (packed->offsets && !offsets)) return DA8W4_BAD_ARGUMENT;
    unpack(*packed, codes, scales, zps, offsets);
    return DA8W4_OK;
}

da8w4_status da8w4_dequantize(const da8w4_packed *packed, const size_t *columns, size_t count, float *out,
                              size_t out_stride) {
    if (!valid(packed)) return DA8W4_BAD_ARGUMENT;
    if (!count) return DA8W4_OK;
    if (!out || (count > 1 && out_stride < packed->k * sizeof(float))) return DA8W4_BAD_ARGUMENT;
    for (size_t i = 0; i < count; i++)
        if ((columns ? columns[i] : i) >= packed->n) return DA8W4_BAD_ARGUMENT;
    dequantize(*packed, columns, count, out, out_stride);
    return DA8W4_OK;
}

da8w4_status da8w4_sum_columns(const da8w4_packed *packed, float *sums) {
    if (!valid(packed) || !sums) return DA8W4_BAD_ARGUMENT;
    sum_columns(*packed, sums);
    return DA8W4_OK;
}

da8w4_status da8w4_quantize_weight(const da8w4_quantization *quantization) {
    if (!valid(quantization)) return DA8W4_BAD_ARGUMENT;
    if (!valid_group(quantization->group, quantization->k)) return DA8W4_BAD_GROUP;
    return quantize_weight(*quantization);
}

// ---- activations -----------------------------------------------------------------------------

da8w4_status da8w4_quantize_rows(const char *name, const void *x, da8w4_type x_type, size_t x_stride, size_t m,
                                 size_t k, da8w4_scheme scheme, void *act, size_t act_stride, float *act_scales,
                                 int32_t *act_zps) {
    const Kernel *kernel;
    const bool symmetric = scheme == DA8W4_ACT_INT8;
    if (!is_float(x_type) || !k || (!symmetric && scheme != DA8W4_ACT_UINT8)) return DA8W4_BAD_ARGUMENT;
    const da8w4_status found = find_kernel(name, &kernel);
    if (found != DA8W4_OK || m == 0) return found;
    if (!x || !act || !act_scales || !act_zps || (m > 1 && (x_stride < k * size_of(x_type) || act_stride < k)))
        return DA8W4_BAD_ARGUMENT;
    parallel(lesser(m * k / kMinValuesPerThread + 1, num_threads()), [&](size_t thread, size_t threads) {
        const Range range = part_of(m, thread, threads);
        for (size_t row = range.begin; row < range.end; row++) {
            kernel->quantize_row(static_cast<const char *>(x) + row * x_stride, x_type, k, symmetric,
                                 symmetric ? 0 : 0x80, static_cast<char *>(act) + row * act_stride, act_scales + row,
                                 act_zps + row);
            if (!symmetric) act_zps[row] += 128;
        }
    });
    return DA8W4_OK;
}

// ---- the product -----------------------------------------------------------------------------

size_t da8w4_workspace_bytes(const da8w4_call *call) {
    const Kernel *kernel;
    if (!valid(call) || find_kernel(call->kernel, &kernel) != DA8W4_OK) return 0;
    return plan_of(*call, *kernel, 1, *call->weight).workspace_bytes();
}

da8w4_status da8w4_gemm(const da8w4_call *call) {
    return execute(call, [](da8w4_type type) { return type == DA8W4_U8 || type == DA8W4_S8; });
}

da8w4_status da8w4_linear(const da8w4_call *call) { return execute(call, is_float); }

// ---- what a call would do, and what the machine can do ---------------------------------------

da8w4_status da8w4_explain(const da8w4_call *call, da8w4_explanation *explanation) {
    if (!valid(call) || call->m == 0 || !explanation) return DA8W4_BAD_ARGUMENT;
    const Kernel *kernel;
    const da8w4_status status = find_kernel(call->kernel, &kernel);
    if (status != DA8W4_OK) return status;
    const Planned<GroupedPlan> planned = plan_of(*call, *kernel, 1, *call->weight);
    *explanation = explain(*call->weight, *kernel, planned.plan, call->m);
    explanation->threads = planned.threads;
    return DA8W4_OK;
}

da8w4_status da8w4_time_read(const char *name, const void *memory, size_t bytes, size_t passes, int streams,
                             size_t threads, uint64_t *nanoseconds) {
    if (!memory || (streams != 1 && streams != 2) || !nanoseconds) return DA8W4_BAD_ARGUMENT;
    const Kernel *kernel;
    const da8w4_status status = find_kernel(name, &kernel);
    if (status != DA8W4_OK) return status;
    *nanoseconds = time_read(*kernel, static_cast<const char *>(memory), bytes, passes, streams == 2,
                             threads ? threads : num_threads());
    return DA8W4_OK;
}

da8w4_status da8w4_time_dots(const char *name, size_t rounds, size_t threads, uint64_t *multiplications,
                             uint64_t *nanoseconds) {
    if (!multiplications || !nanoseconds) return DA8W4_BAD_ARGUMENT;
    const Kernel *kernel;
    const da8w4_status status = find_kernel(name, &kernel);
    if (status != DA8W4_OK) return status;
    *nanoseconds = time_dots(*kernel, rounds, threads ? threads : num_threads(), multiplications);
    return DA8W4_OK;
}

// ---- experts ---------------------------------------------------------------------------------

size_t da8w4_grouped_workspace_bytes(const da8w4_grouped_call *call) {
    const Kernel *kernel;
    if (!valid(call) || find_kernel(call->kernel, &kernel) != DA8W4_OK) return 0;
    return plan_of(*call, *kernel, call->experts, *call->weights).workspace_bytes();
}

da8w4_status da8w4_grouped_linear(const da8w4_grouped_call *call) {
    if (!valid(call) || !call->rows_of_expert) return DA8W4_BAD_ARGUMENT;
    size_t left = call->m;
    for (size_t expert = 0; expert < call->experts; left -= call->rows_of_expert[expert++])
        if (call->rows_of_expert[expert] > left) return DA8W4_BAD_EXPERT;
    if (left) return DA8W4_BAD_EXPERT;
    for (size_t expert = 0; expert < call->experts; expert++)
        if (call->rows_of_expert[expert] && !valid_expert(call->weights, expert)) return DA8W4_BAD_ARGUMENT;
    const Kernel *kernel;
    const da8w4_status status = find_kernel(call->kernel, &kernel);
    if (status != DA8W4_OK || call->m == 0) return status;
    const Planned<GroupedPlan> planned = plan_of(*call, *kernel, call->experts, *call->weights);
    if (!has_operands(*call, call->weights->k, planned.plan.product.product.outputs())) return DA8W4_BAD_ARGUMENT;
    if (call->workspace_bytes < planned.workspace_bytes()) return DA8W4_WORKSPACE_TOO_SMALL;
    const GroupedCall grouped = {.weights = call->experts,
                                 .rows = call->m,
                                 .rows_of_weight = call->rows_of_expert,
                                 .source = source_of(*call),
                                 .operands = operands_of(*call, call->weights)};
    multiply_grouped(grouped, *kernel, planned.plan, static_cast<char *>(call->workspace), planned.threads);
    return DA8W4_OK;
}

size_t da8w4_moe_workspace_bytes(const da8w4_moe_call *call) {
    const Kernel *kernel;
    if (!valid(call) || find_kernel(call->kernel, &kernel) != DA8W4_OK) return 0;
    return plan_of(*call, *kernel).workspace_bytes();
}

da8w4_status da8w4_moe(const da8w4_moe_call *call) {
    if (!valid(call)) return DA8W4_BAD_ARGUMENT;
    const Kernel *kernel;
    const da8w4_status status = find_kernel(call->kernel, &kernel);
    if (status != DA8W4_OK || call->m == 0) return status;
    if (call->slots && (!call->ids || !call->weights)) return DA8W4_BAD_ARGUMENT;
    for (size_t i = 0; i < call->m * call->slots; i++) {
        const int32_t id = call->ids[i];
        if (id < -1 || (id >= 0 && static_cast<size_t>(id) >= call->experts)) return DA8W4_BAD_EXPERT;
        if (id < 0) continue;
        const size_t expert = static_cast<size_t>(id);
        if (!valid_expert(call->gate_up, expert) || !valid_expert(call->down, expert)) return DA8W4_BAD_ARGUMENT;
    }
    if (!has_operands(*call, call->gate_up->k, call->down->n)) return DA8W4_BAD_ARGUMENT;
    const Planned<MoePlan> planned = plan_of(*call, *kernel);
    if (call->workspace_bytes < planned.workspace_bytes()) return DA8W4_WORKSPACE_TOO_SMALL;
    mix_experts(*call, *kernel, planned.plan, planned.threads);
    return DA8W4_OK;
}

// ---- kernels, CPU ----------------------------------------------------------------------------

size_t da8w4_kernel_count() { return kernel_count(); }

const char *da8w4_kernel_name(size_t index) { return index < kernel_count() ? kernel_at(index).name : nullptr; }

const char *da8w4_kernel_description(size_t index) {
    return index < kernel_count() ? kernel_at(index).description : nullptr;
}

const char *da8w4_kernel_reason(size_t index) {
    if (index >= kernel_count()) return "no such kernel";
    return reason_not_runnable(index);
}

da8w4_status da8w4_default_kernel(size_t *index) {
    if (!index) return DA8W4_BAD_ARGUMENT;
    const KernelChoice choice = default_kernel();
    *index = choice.index;
    return choice.status;
}

const char *da8w4_cpu_feature(size_t index, int *present) {
    if (index >= cpu_feature_count) return nullptr;
    if (present) *present = (cpu_bits() & cpu_features[index].bit) != 0;
    return cpu_features[index].name;
}

// ---- texts -----------------------------------------------------------------------------------

const char *da8w4_version() { return DA8W4_VERSION; }

const char *da8w4_status_text(da8w4_status status) {
    switch (status) {
        case DA8W4_OK: return "no error";
        case DA8W4_BAD_ARGUMENT: return "a null pointer, a size of 0, an unknown type, or a stride too short";
        case DA8W4_BAD_GROUP: return "the group size is neither a multiple of 4 nor all of k";
        case DA8W4_BAD_CODE: return "a weight code is out of range";
        case DA8W4_BAD_SCALE: return "a weight scale is NaN or infinite";
        case DA8W4_BAD_OFFSET: return "a weight offset is NaN or infinite";
        case DA8W4_BAD_WEIGHT_ZP: return "a weight zero point is out of range";
        case DA8W4_INEXACT_SCALE: return "a scale or offset of two levels is not exact in float32";
        case DA8W4_INT32_OVERFLOW: return "a group's dot product may not fit int32";
        case DA8W4_BAD_ACT_ZP: return "an activation zero point is out of range";
        case DA8W4_BAD_EXPERT:
            return "an expert's id is out of range, or the rows of all experts are not those of the call";
        case DA8W4_TRANSFORM_NEEDS_FLOATS:
            return "the weight multiplies activations by factors, or rotates them, before they are quantized";
        case DA8W4_UNKNOWN_KERNEL: return "no kernel has this name";
        case DA8W4_KERNEL_UNAVAILABLE: return "this CPU cannot run the kernel";
        case DA8W4_WORKSPACE_TOO_SMALL: return "the workspace is too small";
        case DA8W4_NOT_FINITE: return "a float weight is NaN or infinite";
        case DA8W4_NO_MEMORY: return "there is no memory to quantize in";
    }
    return "unknown status";
}
