/* The C interface from start to end: packs a 2 x 4 weight, multiplies two rows by it, and compares
 * with a result computed in advance. Build it with CMake, or with pkg-config:
 *
 *     cmake -S examples/c -B build-c -Dpyda8w4_DIR=$(python -c 'import pyda8w4; print(pyda8w4.get_cmake_dir())')
 *     cmake --build build-c && build-c/linear
 *
 *     export PKG_CONFIG_PATH=$(python -c 'import pyda8w4; print(pyda8w4.get_pkgconfig_dir())')
 *     cc examples/c/linear.c $(pkg-config --cflags --libs pyda8w4) -o linear && ./linear
 */
#include <pyda8w4/pyda8w4.h>
#include <stdio.h>
#include <stdlib.h>

static void check(da8w4_status status) {
    if (status == DA8W4_OK) return;
    fprintf(stderr, "%s\n", da8w4_status_text(status));
    exit(1);
}

int main(void) {
    /* value = (code - 8) * scale:  0.5 * {1, 0, -1, 2}  and  0.25 * {0, 2, 0, -3} */
    const uint8_t codes[2][4] = {{9, 8, 7, 10}, {8, 10, 8, 5}};
    const float scales[2] = {0.5f, 0.25f};
    const da8w4_weight weight = {.n = 2,
                                 .k = 4,
                                 .group = 4,
                                 .kind = DA8W4_INT4,
                                 .format = DA8W4_CODES_UNSIGNED,
                                 .codes = codes,
                                 .codes_stride = 4,
                                 .scales = scales,
                                 .zps = NULL,
                                 .zp = 8};

    /* The plan says how large the packed arrays are; the caller allocates and owns them. */
    da8w4_packed packed;
    da8w4_packed_bytes bytes;
    check(da8w4_plan_pack(&weight, &packed, &bytes));
    const da8w4_packed_arrays arrays = {.codes = da8w4_alloc(bytes.codes),
                                        .scales = da8w4_alloc(bytes.scales),
                                        .zps = da8w4_alloc(bytes.zps),
                                        .sums = da8w4_alloc(bytes.sums)};
    if (!arrays.codes || !arrays.scales || !arrays.zps || !arrays.sums) return 1;
    check(da8w4_pack(&weight, &packed, &arrays));
    packed.codes = arrays.codes;
    packed.scales = arrays.scales;
    packed.zps = bytes.zps ? arrays.zps : NULL;
    packed.sums = arrays.sums;

    /* The largest magnitude of each row is 127, so quantizing to int8 has scale 1 and loses nothing. */
    const float x[2][4] = {{127, -2, 3, 4}, {0, 127, 0, -127}}, bias[2] = {1, 2};
    const float expected[2][2] = {{67, -2}, {-126, 160.75f}};
    float out[2][2];
    da8w4_call call = {.m = 2,
                       .act = x,
                       .act_type = DA8W4_F32,
                       .act_stride = sizeof x[0],
                       .scheme = DA8W4_ACT_INT8,
                       .weight = &packed,
                       .bias = bias,
                       .out = out,
                       .out_type = DA8W4_F32,
                       .out_stride = sizeof out[0]};
    call.workspace_bytes = da8w4_workspace_bytes(&call);
    call.workspace = da8w4_alloc(call.workspace_bytes);
    check(da8w4_linear(&call));

    int wrong = 0;
    for (int m = 0; m < 2; m++)
        for (int n = 0; n < 2; n++) {
            printf("out[%d][%d] = %g, expected %g\n", m, n, (double)out[m][n], (double)expected[m][n]);
            wrong += out[m][n] != expected[m][n];
        }
    da8w4_free(call.workspace);
    da8w4_free(arrays.sums);
    da8w4_free(arrays.zps);
    da8w4_free(arrays.scales);
    da8w4_free(arrays.codes);
    return wrong != 0;
}
