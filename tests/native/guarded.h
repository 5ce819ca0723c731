// Arrays that fault where they are left.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "system.h"

namespace check {

// An array between two pages that cannot be touched: it ends at the second one, or begins right after the first. It is
// full of garbage until somebody writes it.
class Guarded {
public:
    Guarded() = default;
    Guarded(size_t bytes, bool at_end) : bytes_(bytes), region_(take(bytes)) {
        at_ = at_end ? region_.begin + region_.room - bytes : region_.begin;
        for (size_t i = 0; i < bytes; i++) at_[i] = garbage(i);
    }
    template <class T>
    Guarded(const std::vector<T> &values, bool at_end) : Guarded(values.size() * sizeof(T), at_end) {
        if (bytes_) memcpy(at_, values.data(), bytes_);
    }
    Guarded(Guarded &&other) noexcept { swap(other); }
    Guarded &operator=(Guarded &&other) noexcept {
        swap(other);
        return *this;
    }
    ~Guarded() {
        if (region_.begin) free_regions(region_.room).push_back(region_);
    }

    template <class T = uint8_t>
    T *as() const {
        return reinterpret_cast<T *>(at_);
    }
    size_t bytes() const { return bytes_; }
    std::vector<uint8_t> copy() const { return std::vector<uint8_t>(at_, at_ + bytes_); }
    bool untouched() const {
        for (size_t i = 0; i < bytes_; i++)
            if (at_[i] != garbage(i)) return false;
        return true;
    }

    // As floats: NaN and large ones.
    static uint8_t garbage(size_t i) { return static_cast<uint8_t>(0xff - (i / 4 & 3)); }

private:
    struct Region {
        uint8_t *begin = nullptr;
        size_t room = 0;  // a power of two
    };

    // Regions are mapped once and used again, because a run has a million arrays.
    static std::vector<Region> &free_regions(size_t room) {
        static std::vector<Region> regions[64];
        return regions[__builtin_ctzll(room)];
    }
    static Region take(size_t bytes) {
        static const size_t page = page_bytes();
        Region region;
        for (region.room = page; region.room < bytes;) region.room *= 2;
        std::vector<Region> &regions = free_regions(region.room);
        if (!regions.empty()) {
            region = regions.back();
            regions.pop_back();
            return region;
        }
        region.begin = take_guarded_pages(region.room);
        return region;
    }
    void swap(Guarded &other) {
        std::swap(at_, other.at_);
        std::swap(bytes_, other.bytes_);
        std::swap(region_, other.region_);
    }

    uint8_t *at_ = nullptr;
    size_t bytes_ = 0;
    Region region_;
};

}  // namespace check
