// The driver: activations to int8 rows, then blocks of columns over the kernel's tiles, a span of k at a time.
//
// Few rows (up to the kernel's packed_max): tiles unpack the codes for themselves. More: a span of a block is
// unpacked into a panel that stays in L1 while all rows pass over it. Either way each byte of the weights
// comes from memory once, and is asked for while the bytes before it are being multiplied. K is never split
// between threads, and rows never meet, so neither changes a bit of the result.
#include <cstring>

#include "runtime/cpu.h"
#include "dispatch.h"
#include "half.h"
#include "kernel.h"
#include "runtime/parallel.h"

namespace da8w4 {
namespace {

constexpr size_t kRowBlock = 240;  // rows quantized and multiplied at a time; whole tiles of 4, 5 and 6
constexpr size_t kPanelK = 512;    // k of one panel: 16 KiB of codes, half an L1 cache
constexpr size_t kPackedK = 1024;  // k of one span of packed codes: also 16 KiB
// Panels that take turns over one span of k: while they do, its activations stay in L2.
constexpr size_t kPanelBlocks = 4;
// Tiles whose rows are finished together: the lines of their outputs arrive while they are computed.
constexpr size_t kFinishTiles = 4;
// Up to this many rows, every thread quantizes them all for itself: cheaper than meeting first.
constexpr size_t kPrivateRows = 4;
// Multiplications that are worth a thread: a few microseconds, like the hand-over itself.
constexpr size_t kMinWorkPerThread = 1 << 17;

// An odd number of cache lines, so that rows do not compete for the same sets of L1.
size_t row_stride(size_t k) { return (ceil_div(k, 64) | 1) * 64; }

// Cuts k into spans of at most `most`: whole groups where they fit, else whole chunks of one. A span is
// a few kilobytes of weights, whose time a division would notice.
class Spans {
public:
    Spans(size_t k, size_t group, size_t most)
        : k_(k),
          group_(group),
          most_(group <= most ? most / group * group : most),
          most_groups_(most / group),
          all_groups_(k % group == 0 ? k / group : 0) {}

    Span first() const { return at(0, 0, 0); }

    Span after(const Span &span) const {
        const size_t group = span.group + (most_groups_ ? most_groups_ : span.end == (span.group + 1) * group_);
        const size_t chunks =
            most_groups_ ? most_groups_ * ceil_div(group_, kChunk) : ceil_div(span.end - span.begin, kChunk);
        return at(span.end, group, span.chunk + chunks);
    }

    size_t longest() const { return most_ < k_ ? most_ : k_; }
    size_t most_groups() const { return ceil_div(longest(), group_); }

private:
    Span at(size_t begin, size_t group, size_t chunk) const {
        size_t end = begin + most_, groups = most_groups_;
        if (!most_groups_ && end > (group + 1) * group_) end = (group + 1) * group_;
        if (end > k_) {
            end = k_;
            groups = most_groups_ && all_groups_ ? all_groups_ - group : 0;
        }
        return {begin, end, group, chunk, groups};
    }

    size_t k_, group_;
    size_t most_, most_groups_;  // k and groups of a span; 0 groups if it may end inside one
    size_t all_groups_;          // 0 if the last one is shorter
};

int least_zp(const da8w4_packed &weight) {
    if (!weight.zps) return weight.zp;
    int least = INT8_MAX;
    const size_t count = ceil_div(weight.n, kBlock) * ceil_div(weight.k, weight.group) * kBlock;
    for (size_t i = 0; i < count; i++) least = weight.zps[i] < least ? weight.zps[i] : least;
    return least;
}

// Sizes of everything in the workspace, all multiples of 64 bytes.
struct Workspace {
    Workspace(const da8w4_packed &weight, size_t m, const Kernel &kernel)
        : row_block(m < kRowBlock ? m : kRowBlock),
          // A byte holds code - zp + 128 only down to the zero point -112.
          packed(m <= kernel.packed_max || (kernel.shifted && least_zp(weight) < -112)),
          sums_factor(!packed && kernel.shifted ? -128 : 1),
          private_rows(m <= kPrivateRows),
          groups(ceil_div(weight.k, weight.group)),
          spans(weight.k, weight.group, packed ? kPackedK : kPanelK),
          stride(row_stride(weight.k)),
          sums_stride(round_up(row_block, 16)) {
        rows_bytes = row_block * stride;
        sums_bytes = chunks_before(weight.k, weight.group) * sums_stride * sizeof(int32_t);
        if (weight.offsets) group_sums_bytes = groups * sums_stride * sizeof(float);
        scales_bytes = round_up(row_block * sizeof(float), 64);
        const size_t row_bytes = rows_bytes + sums_bytes + group_sums_bytes + 2 * scales_bytes;
        const size_t tile_bytes = kBlock * sizeof(float);
        acc_bytes = (packed ? 1 : kPanelBlocks) * row_block * tile_bytes;
        if (weight.group > (packed ? kPackedK : kPanelK)) partial_bytes = acc_bytes;
        tile_rows = packed ? kernel.packed_rows : kernel.unpacked_rows;
        if (!packed) {
            const size_t most = weight.group < spans.longest() ? weight.group : spans.longest();
            codes_bytes = spans.most_groups() * round_up(ceil_div(most, kQuad), kernel.panel_quads) * kPanelLineBytes;
        }
        group_bytes = spans.most_groups() * tile_bytes;
        if (weight.offsets) offsets_bytes = group_bytes;
        shared_bytes = private_rows ? 0 : row_bytes;
        thread_bytes =
            acc_bytes + partial_bytes + codes_bytes + 2 * group_bytes + offsets_bytes + (private_rows ? row_bytes : 0);
    }

    size_t row_block;
    bool packed;  // tiles read packed codes
    size_t tile_rows;
    int32_t sums_factor;
    bool private_rows;
    size_t groups;
    Spans spans;
    size_t stride, sums_stride;
    size_t rows_bytes, sums_bytes, group_sums_bytes = 0, scales_bytes;
    size_t acc_bytes = 0, partial_bytes = 0, codes_bytes = 0, group_bytes = 0, offsets_bytes = 0;
    size_t shared_bytes, thread_bytes;
};

// Hands out pieces of the workspace in order.
class Carver {
public:
    explicit Carver(void *memory) : at_(static_cast<char *>(memory)) {}
    template <class T>
    T *take(size_t bytes) {
        char *piece = at_;
        at_ += bytes;
        return reinterpret_cast<T *>(piece);
    }

private:
    char *at_;
};

// Quantized rows of one row block.
struct Rows {
    Rows(const Workspace &space, Carver &carver)
        : act(carver.take<int8_t>(space.rows_bytes)),
          sums(carver.take<int32_t>(space.sums_bytes)),
          group_sums(carver.take<float>(space.group_sums_bytes)),
          scales(carver.take<float>(space.scales_bytes)),
          zps(carver.take<float>(space.scales_bytes)) {}

    int8_t *act;
    int32_t *sums;
    float *group_sums;  // filled in where weights have offsets
    float *scales;
    float *zps;  // z_a - c
};

// What one thread works in.
struct Scratch {
    Scratch(const Workspace &space, Carver &carver)
        : acc(carver.take<float>(space.acc_bytes)),
          partial(carver.take<int32_t>(space.partial_bytes)),
          room{space.packed ? nullptr : carver.take<uint8_t>(space.codes_bytes), carver.take<float>(space.group_bytes),
               carver.take<float>(space.offsets_bytes), carver.take<int32_t>(space.group_bytes)} {}

    float *acc;
    int32_t *partial;
    Room room;
};

bool is_float(da8w4_type type) { return type == DA8W4_F32 || type == DA8W4_F16 || type == DA8W4_BF16; }
size_t size_of(da8w4_type type) { return type == DA8W4_F32 ? 4 : is_float(type) ? 2 : 1; }

// Rows begin..end as tiles of nearly equal height, the higher ones first: 7 rows are 4 and 3, not 6 and 1.
struct TileRows {
    TileRows(Range rows, size_t most)
        : begin(rows.begin),
          end(rows.end),
          tiles(ceil_div(end - begin, most)),
          height((end - begin) / tiles),
          higher((end - begin) % tiles),
          lines_ahead(ceil_div(kStepQuads * kLineBytes / 64, tiles)) {}

    size_t begin, end;
    size_t tiles, height;  // height + 1 for the first `higher` of them
    size_t higher;
    size_t lines_ahead;  // that each step asks for
};

class Product {
public:
    Product(const da8w4_call &call, const Kernel &kernel, const Workspace &space)
        : call_(call), weight_(*call.weight), kernel_(kernel), space_(space) {}

    void run(size_t threads) const {
        char *memory = static_cast<char *>(call_.workspace);
        for (size_t row = 0; row < call_.m; row += space_.row_block) {
            const size_t rows = call_.m - row < space_.row_block ? call_.m - row : space_.row_block;
            if (!space_.private_rows)
                parallel(threads, [&](size_t thread, size_t count) {
                    Carver carver(memory);
                    const Rows shared(space_, carver);
                    const Range range = part_of(rows, thread, count);
                    for (size_t r = range.begin; r < range.end; r++) prepare_row(row + r, r, shared);
                });
            parallel(threads, [&](size_t thread, size_t count) {
                Carver own(memory + space_.shared_bytes + thread * space_.thread_bytes);
                Carver common(memory);
                const Rows prepared(space_, space_.private_rows ? own : common);
                const Scratch scratch(space_, own);
                if (space_.private_rows)
                    for (size_t r = 0; r < rows; r++) prepare_row(row + r, r, prepared);
                multiply(row, rows, prepared, scratch, thread, count);
            });
        }
    }

private:
    // Row `from` of the activations to row `to` of the prepared ones.
    void prepare_row(size_t from, size_t to, const Rows &rows) const {
        const size_t k = weight_.k;
        const char *source = static_cast<const char *>(call_.act) + from * call_.act_stride;
        int8_t *act = rows.act + to * space_.stride;
        if (is_float(call_.act_type)) {
            int32_t zp;
            kernel_.quantize_row(source, call_.act_type, k, call_.symmetric != 0, 0, act, rows.scales + to, &zp);
            rows.zps[to] = static_cast<float>(zp);
        } else {
            const bool shifted = call_.act_type == DA8W4_U8;
            const uint8_t flip = shifted ? 0x80 : 0;  // flipping the sign bit is subtracting 128
            for (size_t i = 0; i < k; i++) act[i] = static_cast<int8_t>(source[i] ^ flip);
            rows.scales[to] = call_.act_scales ? call_.act_scales[from] : 1.0f;
            rows.zps[to] = static_cast<float>((call_.act_zps ? call_.act_zps[from] : 0) - (shifted ? 128 : 0));
        }
        memset(act + k, 0, space_.stride - k);
        kernel_.sum_row(act, k, weight_.group, space_.sums_factor, rows.sums + to, space_.sums_stride);
        if (weight_.offsets) sum_groups(rows.sums + to, rows.group_sums + to);
    }

    // From the sums of one row's chunks. A division by the factor, a power of two, rounds nothing.
    void sum_groups(const int32_t *sums, float *group_sums) const {
        const float inverse = 1.0f / static_cast<float>(space_.sums_factor);
        const size_t chunks = chunks_before(weight_.k, weight_.group), most = ceil_div(weight_.group, kChunk);
        for (size_t chunk = 0; chunk < chunks; group_sums += space_.sums_stride) {
            const size_t end = chunk + most < chunks ? chunk + most : chunks;
            int64_t sum = 0;
            for (; chunk < end; chunk++, sums += space_.sums_stride) sum += *sums;
            *group_sums = static_cast<float>(sum) * inverse;
        }
    }

    // This thread's share of blocks x rows. Rows are split only where blocks alone are too few.
    void multiply(size_t row, size_t rows, const Rows &prepared, const Scratch &scratch, size_t thread,
                  size_t threads) const {
        const size_t tiles = ceil_div(rows, space_.tile_rows), blocks = ceil_div(weight_.n, kBlock);
        size_t parts = threads == 1 ? 1 : ceil_div(4 * threads, blocks);
        if (parts > tiles) parts = tiles;
        const Range range = part_of(parts * blocks, thread, threads);
        const size_t most = space_.packed ? 1 : kPanelBlocks;
        size_t part = range.begin / blocks, block = range.begin % blocks;
        for (size_t left = range.end - range.begin; left; part++, block = 0) {
            const TileRows tile_rows(part_of(rows, part, parts), space_.tile_rows);
            for (size_t end; left && block < blocks; left -= end - block, block = end) {
                end = block + (left < most ? left : most);
                if (end > blocks) end = blocks;
                multiply_blocks({block, end}, row, tile_rows, prepared, scratch);
            }
        }
        if (kernel_.leave) kernel_.leave();
    }

    Block block_at(size_t block) const {
        const size_t at = block * space_.groups * kBlock;
        const size_t scale_bytes = at * size_of(weight_.scale_type);
        return {weight_.codes + block * ceil_div(weight_.k, kQuad) * kLineBytes,
                static_cast<const char *>(weight_.scales) + scale_bytes,
                weight_.scale_type,
                weight_.zps ? weight_.zps + at : nullptr,
                weight_.zp,
                weight_.offsets ? static_cast<const char *>(weight_.offsets) + scale_bytes : nullptr};
    }

    // What follows `block` over `span` in the order of multiply_blocks, or the same again at the end.
    Ahead look_ahead(size_t block, Range blocks, const Span &span, size_t lines) const {
        const bool same_span = block + 1 < blocks.end, same_blocks = same_span || span.end < weight_.k;
        const size_t next = same_span ? block + 1 : same_blocks ? blocks.begin : blocks.end;
        const Span then = same_span ? span : same_blocks ? space_.spans.after(span) : space_.spans.first();
        const bool none = next * kBlock >= weight_.n;
        const Block source = block_at(none ? block : next);
        const size_t at = then.group * kBlock, scale_bytes = at * size_of(weight_.scale_type);
        const uint8_t *codes = source.codes + then.begin / kQuad * kLineBytes;
        return {static_cast<const char *>(source.scales) + scale_bytes,
                source.zps ? source.zps + at : nullptr,
                source.offsets ? static_cast<const char *>(source.offsets) + scale_bytes : nullptr,
                codes,
                codes + (then.end - then.begin) / kQuad * kLineBytes,
                none ? 0 : lines};
    }

    void multiply_blocks(Range blocks, size_t first_row, const TileRows &rows, const Rows &prepared,
                         const Scratch &scratch) const {
        const size_t count = rows.end - rows.begin;
        for (Span span = space_.spans.first(); span.begin < weight_.k; span = space_.spans.after(span)) {
            const bool last = span.end == weight_.k;
            for (size_t block = blocks.begin; block < blocks.end; block++) {
                const Block source = block_at(block);
                Ahead ahead = look_ahead(block, blocks, span, rows.lines_ahead);
                const Panel panel = kernel_.unpack(source, weight_.group, span, scratch.room, rows.tiles, ahead);
                for (size_t row = rows.begin, tile = 0, batch; tile < rows.tiles; tile += batch) {
                    const size_t left = (tile < rows.higher ? rows.higher : rows.tiles) - tile;
                    batch = last && left > kFinishTiles ? kFinishTiles : left;
                    const size_t height = rows.height + (tile < rows.higher), batch_end = row + batch * height;
                    if (last)
                        for (size_t r = row; r < batch_end; r++) __builtin_prefetch(out_at(block, first_row + r), 0, 2);
                    const size_t at = ((block - blocks.begin) * count + row - rows.begin) * kBlock;
                    const Tiles these = {
                        batch,
                        height,
                        {prepared.act + row * space_.stride + span.begin, space_.stride,
                         prepared.sums + span.chunk * space_.sums_stride + row,
                         prepared.group_sums + span.group * space_.sums_stride + row, space_.sums_stride},
                        weight_.k,
                        weight_.group,
                        span,
                        scratch.acc + at,
                        scratch.partial + at,
                        ahead};
                    if (space_.packed)
                        kernel_.packed_tiles(these, panel);
                    else
                        kernel_.unpacked_tiles(these, panel);
                    ahead.codes += batch * ahead.lines * ((span.end - span.begin) / (kStepQuads * kQuad)) * 64;
                    if (last) finish(block, first_row, row, batch_end - row, prepared, scratch.acc + at);
                    row = batch_end;
                }
            }
        }
    }

    char *out_at(size_t block, size_t row) const {
        return static_cast<char *>(call_.out) + row * call_.out_stride + block * kBlock * size_of(call_.out_type);
    }

    // Rows row.. of the row block that starts at first_row.
    void finish(size_t block, size_t first_row, size_t row, size_t rows, const Rows &prepared, const float *acc) const {
        const size_t n = block * kBlock, cols = weight_.n - n < kBlock ? weight_.n - n : kBlock;
        kernel_.finish_rows({rows, cols, acc, weight_.sums + n, call_.bias ? call_.bias + n : nullptr,
                             prepared.scales + row, prepared.zps + row, out_at(block, first_row + row),
                             call_.out_stride, call_.out_type});
    }

    const da8w4_call &call_;
    const da8w4_packed &weight_;
    const Kernel &kernel_;
    const Workspace &space_;
};

bool valid(const da8w4_packed *weight) {
    return weight && weight->n && weight->k && weight->group && weight->group <= weight->k &&
           (weight->group % kQuad == 0 || weight->group == weight->k) && is_float(weight->scale_type) &&
           weight->codes && weight->scales && weight->sums;
}

da8w4_status check_zps(const da8w4_call &call) {
    if (!call.act_zps) return DA8W4_OK;
    const int32_t low = call.act_type == DA8W4_U8 ? 0 : INT8_MIN, high = call.act_type == DA8W4_U8 ? 255 : INT8_MAX;
    for (size_t row = 0; row < call.m; row++)
        if (call.act_zps[row] < low || call.act_zps[row] > high) return DA8W4_BAD_ACT_ZP;
    return DA8W4_OK;
}

size_t threads_of(const da8w4_call &call) {
    // In integers: floating point would leave its exception flags with the caller.
    const size_t useful = call.m * call.weight->n / ceil_div(kMinWorkPerThread, call.weight->k) + 1;
    const size_t threads = call.threads ? call.threads : da8w4_get_num_threads();
    return threads < useful ? threads : useful;
}

da8w4_status run(const da8w4_call *call, bool quantize) {
    if (!call || !valid(call->weight) || !is_float(call->out_type)) return DA8W4_BAD_ARGUMENT;
    if (quantize ? !is_float(call->act_type) : call->act_type != DA8W4_U8 && call->act_type != DA8W4_S8)
        return DA8W4_BAD_ARGUMENT;
    const Kernel *kernel;
    const da8w4_status found = find_kernel(call->kernel, &kernel);
    if (found != DA8W4_OK) return found;
    if (call->m == 0) return DA8W4_OK;
    const size_t n = call->weight->n, k = call->weight->k;
    if (!call->act || !call->out || !call->workspace || reinterpret_cast<uintptr_t>(call->workspace) % 64 ||
        (call->m > 1 &&
         (call->act_stride < k * size_of(call->act_type) || call->out_stride < n * size_of(call->out_type))))
        return DA8W4_BAD_ARGUMENT;
    if (!quantize)
        if (const da8w4_status status = check_zps(*call)) return status;

    const Workspace space(*call->weight, call->m, *kernel);
    const size_t threads = threads_of(*call);
    if (call->workspace_bytes < space.shared_bytes + threads * space.thread_bytes) return DA8W4_WORKSPACE_TOO_SMALL;
    Product(*call, *kernel, space).run(threads);
    return DA8W4_OK;
}

}  // namespace
}  // namespace da8w4

using namespace da8w4;

size_t da8w4_workspace_bytes(const da8w4_call *call) {
    const Kernel *kernel;
    if (!call || !valid(call->weight) || find_kernel(call->kernel, &kernel) != DA8W4_OK) return 0;
    const Workspace space(*call->weight, call->m, *kernel);
    return space.shared_bytes + threads_of(*call) * space.thread_bytes;
}

da8w4_status da8w4_gemm(const da8w4_call *call) { return run(call, false); }

da8w4_status da8w4_linear(const da8w4_call *call) { return run(call, true); }

da8w4_status da8w4_quantize_rows(const char *name, const void *x, da8w4_type x_type, size_t x_stride, size_t m,
                                 size_t k, int symmetric, void *act, size_t act_stride, float *act_scales,
                                 int32_t *act_zps) {
    const Kernel *kernel;
    if (!is_float(x_type) || !k) return DA8W4_BAD_ARGUMENT;
    const da8w4_status found = find_kernel(name, &kernel);
    if (found != DA8W4_OK || m == 0) return found;
    if (!x || !act || !act_scales || !act_zps || (m > 1 && (x_stride < k * size_of(x_type) || act_stride < k)))
        return DA8W4_BAD_ARGUMENT;
    const size_t useful = m * k / kMinWorkPerThread + 1, most = da8w4_get_num_threads();
    parallel(useful < most ? useful : most, [&](size_t thread, size_t threads) {
        const Range range = part_of(m, thread, threads);
        for (size_t row = range.begin; row < range.end; row++) {
            kernel->quantize_row(static_cast<const char *>(x) + row * x_stride, x_type, k, symmetric != 0,
                                 symmetric ? 0 : 0x80, static_cast<char *>(act) + row * act_stride, act_scales + row,
                                 act_zps + row);
            if (!symmetric) act_zps[row] += 128;
        }
    });
    return DA8W4_OK;
}
