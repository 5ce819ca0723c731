// The tile instructions of Intel AMX as functions. They are inline assembly that clobbers memory, because GCC 12's
// intrinsics do not say what they read: it deletes the stores that fill a configuration or a matrix.
//
// tmm0, 1 and 2, 3: sums of 16 rows by 32 columns, in turn; tmm4: activations; tmm5, 6: weights.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace da8w4 {
namespace {

struct TileConfig {  // what LDTILECFG reads
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];

    void set(int tile, size_t tile_rows, size_t bytes) {
        rows[tile] = static_cast<uint8_t>(tile_rows);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

inline void load_config(const TileConfig &config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
inline void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile) : "memory");
}

template <int kTile>
inline void load_tile(const void *from, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void *to, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// kSum += kAct * kWeight, both of int8.
template <int kSum, int kAct, int kWeight>
inline void multiply_tiles() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kAct), "i"(kWeight) : "memory");
}

}  // namespace
}  // namespace da8w4
