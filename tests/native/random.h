// Random numbers that are the same on every machine, which the distributions of <random> do not promise.
#pragma once

#include <cstddef>
#include <cstdint>

namespace check {

// splitmix64. A stream also has children, one for each name and number, which depend on how it began and not on what
// was drawn from it: a case that draws one number more leaves every other case as it was.
class Random {
public:
    explicit Random(uint64_t seed) : key_(seed), state_(seed) {}

    Random child(uint64_t number) const { return Random(mixed(key_ ^ mixed(number + kStep))); }
    Random child(const char *name) const {
        uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
        for (; *name; name++) hash = (hash ^ static_cast<uint8_t>(*name)) * 0x100000001b3;
        return child(hash);
    }

    uint64_t bits() { return mixed(state_ += kStep); }
    size_t below(size_t count) { return static_cast<size_t>(bits() % count); }
    bool one_in(size_t count) { return below(count) == 0; }
    int between(int low, int high) { return low + static_cast<int>(below(static_cast<size_t>(high - low) + 1)); }
    float uniform(float low, float high) { return low + (high - low) * (static_cast<float>(bits() >> 40) * 0x1p-24f); }

private:
    static constexpr uint64_t kStep = 0x9e3779b97f4a7c15;

    static uint64_t mixed(uint64_t z) {
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }

    uint64_t key_, state_;
};

}  // namespace check
