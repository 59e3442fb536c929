// The kernels, checked without Python: for sanitizers, and for CPUs that there are as emulators only (make asan, make
// arm, make old-cpu). What goes into a node lies in memory of just the size it needs, so that a read past an end is
// seen; what comes out is compared with the same in doubles.
#include "../errors.h"
#include "../kernels/hook.h"
#include "../kernels/kernels.h"
#include "../kernels/probe.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>

namespace {

using namespace pyps::kernels;

constexpr double kExact = 1e-5;  // of the sum of all absolute products, or of values of about 1: rounding of f32
constexpr double kGgmls = 1e-2;  // ggml's own products quantise columns otherwise
constexpr double kGgmlsAttention = 1e-1;  // and its attention quantises queries, and sums V in f16

std::atomic<int> n_products{ 0 }, n_repacked{ 0 }, n_attentions{ 0 }, n_others{ 0 }, n_wrong{ 0 };

// Counts a fault, and prints the first ones.
__attribute__((format(printf, 1, 2))) void wrong(const char * format, ...) {
    static std::mutex           printing;
    std::lock_guard<std::mutex> lock(printing);
    if (++n_wrong <= 40) {
        va_list words;
        va_start(words, format);
        printf("WRONG: ");
        vprintf(format, words);
        printf("\n");
        va_end(words);
    }
}

void expect(bool holds, const char * what) {
    ++n_others;
    if (!holds) {
        wrong("%s", what);
    }
}

class Random {
  public:
    explicit Random(uint64_t seed) : bits_(seed) {}

    int64_t whole(int64_t least, int64_t most) { return least + int64_t(bits_() % uint64_t(most - least + 1)); }

    bool one_in(int n) { return whole(1, n) == 1; }

    float normal() { return normal_(bits_); }

    float between(float low, float high) { return low + (high - low) * float(bits_() >> 40) / float(1 << 24); }

    template <typename T, size_t n> T one_of(const T (&all)[n]) { return all[whole(0, n - 1)]; }

    template <typename T> void fill_bits(std::vector<T> & values) {
        for (size_t at = 0; at < values.size() * sizeof(T); at += sizeof(uint64_t)) {
            const uint64_t x = bits_();
            memcpy((char *) values.data() + at, &x, std::min(sizeof(x), values.size() * sizeof(T) - at));
        }
    }

  private:
    std::mt19937_64                 bits_;
    std::normal_distribution<float> normal_;
};

// What is not a number must not become one, and the other way round.
bool is_near(float got, double want, double tolerance) {
    return std::isnan(want) ? std::isnan(got) : std::abs(got - want) <= tolerance;
}

ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name(ggml_type(i));
        if (known && name == known) {
            return ggml_type(i);
        }
    }
    throw pyps::EngineError("ggml knows no type " + name);
}

std::vector<uint8_t> pack(ggml_type type, const std::vector<float> & values, int64_t width) {
    const int64_t        rows = int64_t(values.size()) / width;
    std::vector<uint8_t> packed(rows * ggml_row_size(type, width));
    ggml_quantize_chunk(type, values.data(), packed.data(), 0, rows, width, nullptr);
    return packed;
}

std::vector<float> unpack(ggml_type type, const std::vector<uint8_t> & packed) {
    std::vector<float> values(packed.size() / ggml_type_size(type) * ggml_blck_size(type));
    if (type == GGML_TYPE_F32) {
        memcpy(values.data(), packed.data(), packed.size());
    } else {
        ggml_get_type_traits(type)->to_float(packed.data(), values.data(), int64_t(values.size()));
    }
    return values;
}

// --- products ---

// Every pattern of bits, but scales that are finite and of about one size.
std::vector<uint8_t> random_weights(Random & random, ggml_type type, int64_t rows, int64_t k) {
    const size_t         size = ggml_type_size(type);
    std::vector<uint8_t> weights(rows * ggml_row_size(type, k));
    random.fill_bits(weights);
    const auto put = [&](size_t at, float low, float high) {
        const ggml_fp16_t scale = ggml_fp32_to_fp16(0.01f * random.between(low, high));
        memcpy(weights.data() + at, &scale, sizeof(scale));
    };
    const bool two =
        type == GGML_TYPE_Q4_1 || type == GGML_TYPE_Q5_1 || type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K;
    for (size_t at = 0; at < weights.size(); at += size) {
        put(at + (type == GGML_TYPE_Q6_K ? 208 : 0), random.one_in(2) ? 0.5f : -1.5f, random.one_in(2) ? 0.6f : 1.5f);
        if (two) {
            put(at + 2, -0.5f, 1.5f);
        }
    }
    return weights;
}

// A column as it is multiplied: each 32 values with a scale and 8 bits. Where one is not finite, none is a number.
void quantise(const float * x, int64_t k, double * out) {
    for (int64_t b = 0; b < k; b += kBlock) {
        float limit  = 0.0f;
        bool  finite = true;
        for (int64_t i = b; i < b + kBlock; ++i) {
            limit  = std::max(limit, std::abs(x[i]));
            finite = finite && std::isfinite(x[i]);
        }
        const float  inverse = limit > 1e-35f ? 127.0f / limit : 0.0f;
        const double scale   = finite ? limit / 127.0f : NAN;
        for (int64_t i = b; i < b + kBlock; ++i) {
            out[i] = finite ? scale * std::nearbyint(x[i] * inverse) : NAN;
        }
    }
}

struct ProductCase {
    ProductProbe         probe;
    bool                 ordinary;  // columns of normal values, which ggml's own product can cope with
    std::vector<uint8_t> weights;
    std::vector<float>   columns;
    std::vector<double>  want, size;  // [columns][rows]; the sums of the products and of their absolute values

    ProductCase(Random &               random,
                ggml_type              type,
                bool                   any_bits,
                int64_t                rows,
                int64_t                k,
                std::array<int64_t, 3> n,
                bool                   gaps,
                bool                   ordinary,
                int                    threads,
                bool                   repacked = false) :
        probe{ type, k, rows, nullptr, nullptr, n, {}, threads, repacked },
        ordinary(ordinary) {
        if (any_bits) {
            weights = random_weights(random, type, rows, k);
        } else {
            std::vector<float> values(rows * k);
            std::generate(values.begin(), values.end(), [&] { return random.normal(); });
            weights = pack(type, values, k);
        }
        size_t stride = k, last = k;
        for (int i = 0; i < 3; ++i) {
            stride += gaps ? random.whole(0, 40) : 0;
            probe.stride[i] = stride * sizeof(float);
            last += (n[i] - 1) * stride;
            stride *= n[i];
        }
        columns.resize(last, NAN);  // what lies between columns must not matter
        probe.weights = weights.data();
        probe.columns = columns.data();
        fill(random);
    }

    // the probe points into the vectors
    ProductCase(ProductCase &&)      = default;
    ProductCase(const ProductCase &) = delete;

    int64_t n() const { return probe.n[0] * probe.n[1] * probe.n[2]; }

    // Compares what whichever kernels are in use compute.
    void check(const char * name, double tolerance) const { compare(name, probe.run(), tolerance); }

    // Compares what kernels of ours compute. A single column they may leave to ggml, where that is as fast.
    void check_ours(const char * name) const {
        const uint64_t           before = computed();
        const std::vector<float> got    = probe.run();
        const bool               ours   = computed() > before;
        if (!ours && n() > 1) {
            wrong("%s: did not compute a product with %s", name, ggml_type_name(ggml_type(probe.type)));
        }
        compare(name, got, ours ? kExact : kGgmls);
    }

  private:
    void compare(const char * name, const std::vector<float> & got, double tolerance) const {
        ++n_products;
        n_repacked += probe.repacked;
        for (size_t i = 0; i < want.size(); ++i) {
            if (!is_near(got[i], want[i], tolerance * size[i] + 1e-36)) {
                wrong("%s: %s%s, %d rows, k = %d, columns %dx%dx%d, %d threads: column %d row %d is %g instead of %g",
                      name, ggml_type_name(ggml_type(probe.type)), probe.repacked ? " repacked" : "", int(probe.rows),
                      int(probe.k), int(probe.n[0]), int(probe.n[1]), int(probe.n[2]), probe.threads,
                      int(i / probe.rows), int(i % probe.rows), got[i], want[i]);
                return;
            }
        }
    }

    float * column(int64_t c) {
        const int64_t i0 = c % probe.n[0], i1 = c / probe.n[0] % probe.n[1], i2 = c / probe.n[0] / probe.n[1];
        return columns.data() + (i0 * probe.stride[0] + i1 * probe.stride[1] + i2 * probe.stride[2]) / sizeof(float);
    }

    void fill(Random & random) {
        const int64_t            k = probe.k, rows = probe.rows;
        const std::vector<float> w = unpack(ggml_type(probe.type), weights);
        std::vector<double>      x(k);
        want.resize(n() * rows);
        size.resize(n() * rows);
        for (int64_t c = 0; c < n(); ++c) {
            float *     values = column(c);
            const int   kind   = ordinary ? 0 : int(random.whole(0, 9));
            const float factor = kind == 1 ? 0.0f : kind == 2 ? 1e30f : kind == 3 ? 1e-30f : kind == 4 ? 1e-44f : 1.0f;
            for (int64_t i = 0; i < k; ++i) {
                values[i] = factor * random.normal();
            }
            if (kind == 5 || kind == 6) {
                values[random.whole(0, k - 1)] = kind == 5 ? NAN : INFINITY;
            }
            if (kind == 7) {  // sums that are as great as can be
                std::fill(values, values + k, random.one_in(2) ? 1.0f : -1.0f);
            }
            quantise(values, k, x.data());
            for (int64_t r = 0; r < rows; ++r) {
                const float * row = w.data() + r * k;
                double        sum = 0.0, all = 0.0;
                for (int64_t i = 0; i < k; ++i) {
                    const double product = row[i] * x[i];
                    sum += product;
                    all += std::abs(product);
                }
                want[c * rows + r] = sum;
                size[c * rows + r] = all;
            }
        }
    }
};

int some_threads(Random & random) {
    return random.one_in(6) ? 16 : int(random.whole(1, 5));
}

std::vector<ProductCase> product_cases(Random & random, ggml_type type, bool any_bits, int n, bool repacked = false) {
    const int64_t            block = ggml_blck_size(type) > 1 ? ggml_blck_size(type) : kBlock;
    std::vector<ProductCase> all;
    for (int i = 0; i < n; ++i) {
        const int64_t rows    = repacked ? random.whole(1, 9) * 8 : random.whole(0, 37) * 2 + 1;
        const int64_t k       = random.whole(1, block == 256 ? 6 : 40) * block;
        const bool    several = i % 3 == 2;
        const auto    columns = several  ? std::array<int64_t, 3>{ random.whole(1, 6), random.whole(1, 4), 3 }
                                : i == 3 ? std::array<int64_t, 3>{ 1, 1, 1 }
                                         : std::array<int64_t, 3>{ random.whole(2, random.one_in(2) ? 9 : 70), 1, 1 };
        // ggml's own may be what computes a single column
        const bool ordinary = !any_bits || i % 4 < 2 || (columns[0] == 1 && (block == 256 || repacked));
        // and they take columns for dense where weights are repacked
        const bool gaps = i % 2 == 1 && !(repacked && !any_bits);
        all.emplace_back(random, type, any_bits, rows, k, columns, gaps, ordinary, some_threads(random), repacked);
    }
    return all;
}

// Whether ggml repacks weights for this CPU in the way that we know.
bool repacks(const std::string & type) {
    return ggml_cpu_has_avx2() && (type == "q4_0" || type == "q4_K" || type == "iq4_nl");
}

// --- attention ---

constexpr ggml_type kCaches[] = { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };

struct AttentionSizes {
    int64_t   streams = 1, tokens = 1, kv_heads = 2, group = 2, cells = 100, dk = 64, dv = 64;
    ggml_type k_type = GGML_TYPE_F16, v_type = GGML_TYPE_F16;
    bool      masked = true, sinks = false;
    float     bias = 0.0f, cap = 0.0f;
    bool      ordinary = true;  // nothing that is not a number, in queries or in hidden cells
    int       threads  = 2;
};

struct AttentionCase {
    AttentionSizes        s;
    std::vector<float>    q, sinks;
    std::vector<uint8_t>  k, v;
    std::vector<uint16_t> mask;
    std::vector<double>   want;  // [streams][tokens][heads][dv]

    AttentionCase(Random & random, const AttentionSizes & sizes) : s(sizes) {
        const auto normal = [&] { return random.normal(); };
        const auto cache  = [&](ggml_type type, int64_t width) {
            std::vector<float> values(s.streams * s.cells * s.kv_heads * width);
            std::generate(values.begin(), values.end(), normal);
            return pack(type, values, width);
        };
        q.resize(s.streams * s.tokens * heads() * s.dk);
        std::generate(q.begin(), q.end(), [&] { return 2.0f * random.normal(); });
        k = cache(s.k_type, s.dk);
        v = cache(s.v_type, s.dv);
        if (s.sinks) {
            sinks.resize(heads());
            std::generate(sinks.begin(), sinks.end(), normal);
        }
        if (s.masked) {
            make_mask(random);
        }
        if (!s.ordinary) {
            q[random.whole(0, int64_t(q.size()) - 1)] = NAN;
        }
        compute();
    }

    int64_t heads() const { return s.kv_heads * s.group; }

    void check(const char * name, double tolerance) const {
        const AttentionProbe     probe{ s.streams,
                                    s.tokens,
                                    heads(),
                                    s.kv_heads,
                                    s.cells,
                                    s.dk,
                                    s.dv,
                                    q.data(),
                                    s.k_type,
                                    s.v_type,
                                    k.data(),
                                    v.data(),
                                    s.masked ? mask.data() : nullptr,
                                    s.sinks ? sinks.data() : nullptr,
                                    scale(),
                                    s.bias,
                                    s.cap,
                                    s.threads };
        const std::vector<float> got = probe.run();
        ++n_attentions;
        for (size_t i = 0; i < want.size(); ++i) {
            if (!is_near(got[i], want[i], tolerance)) {
                wrong("%s: attention of %d streams x %d tokens x %d/%d heads over %d cells, dk = %d of %s, dv = %d of "
                      "%s, mask %d, sinks %d, bias %g, cap %g, %d threads: value %d is %g instead of %g",
                      name, int(s.streams), int(s.tokens), int(heads()), int(s.kv_heads), int(s.cells), int(s.dk),
                      ggml_type_name(s.k_type), int(s.dv), ggml_type_name(s.v_type), s.masked, s.sinks, s.bias, s.cap,
                      s.threads, int(i), got[i], want[i]);
                return;
            }
        }
    }

  private:
    float scale() const { return 1.0f / std::sqrt(float(s.dk)); }

    // Some cells are hidden from all; they hold what is not a number, unless everything is to be ordinary.
    void make_mask(Random & random) {
        const ggml_fp16_t none = ggml_fp32_to_fp16(-INFINITY);
        mask.resize(s.streams * s.tokens * s.cells);
        for (uint16_t & m : mask) {
            m = random.one_in(3) ? none : ggml_fp32_to_fp16(-float(random.whole(0, 9)));
        }
        for (int64_t stream = 0; stream < s.streams; ++stream) {
            uint16_t * rows = mask.data() + stream * s.tokens * s.cells;
            for (int64_t c = 0; c < s.cells; ++c) {
                const bool hidden = c < s.cells / 3 || (c + 1 < s.cells && random.one_in(8));
                for (int64_t t = 0; t < s.tokens && hidden; ++t) {
                    rows[t * s.cells + c] = none;
                }
                if (hidden && !s.ordinary) {
                    const size_t k_cell = k.size() / (s.streams * s.cells), v_cell = v.size() / (s.streams * s.cells);
                    memset(k.data() + (stream * s.cells + c) * k_cell, 0xff, k_cell);
                    memset(v.data() + (stream * s.cells + c) * v_cell, 0xff, v_cell);
                }
            }
            for (int64_t t = 0; t < s.tokens; ++t) {
                if (t % 5 == 3) {  // sees nothing
                    std::fill_n(rows + t * s.cells, s.cells, none);
                } else {
                    rows[t * s.cells + s.cells - 1] = ggml_fp32_to_fp16(0.0f);
                }
            }
        }
    }

    // ALiBi's slope, as its paper defines it for any number of heads.
    double slope(int64_t head) const {
        int64_t n = 1;
        while (2 * n <= heads()) {
            n *= 2;
        }
        return s.bias == 0.0f ? 1.0
               : head < n     ? std::pow(2.0, -s.bias * double(head + 1) / double(n))
                              : std::pow(2.0, -s.bias / 2.0 * double(2 * (head - n) + 1) / double(n));
    }

    void compute() {
        const std::vector<float> keys = unpack(s.k_type, k), values = unpack(s.v_type, v);
        std::vector<double>      scores(s.cells);
        want.assign(s.streams * s.tokens * heads() * s.dv, 0.0);
        for (int64_t row = 0; row < s.streams * s.tokens * heads(); ++row) {
            const int64_t    head = row % heads(), stream = row / heads() / s.tokens;
            const float *    query = q.data() + row * s.dk;
            const uint16_t * hides = s.masked ? mask.data() + row / heads() * s.cells : nullptr;
            double           most  = s.sinks ? sinks[head] : -INFINITY;
            const auto       cell  = [&](int64_t c) { return (stream * s.cells + c) * s.kv_heads + head / s.group; };
            for (int64_t c = 0; c < s.cells; ++c) {
                const double m = hides ? ggml_fp16_to_fp32(hides[c]) : 0.0;
                if (m == -INFINITY) {
                    scores[c] = -INFINITY;
                    continue;
                }
                const float * key = keys.data() + cell(c) * s.dk;
                double        sum = 0.0;
                for (int64_t i = 0; i < s.dk; ++i) {
                    sum += double(query[i]) * key[i];
                }
                sum *= scale();
                scores[c] = (s.cap != 0.0f ? s.cap * std::tanh(sum / s.cap) : sum) + slope(head) * m;
                most      = std::max(most, scores[c]);
            }
            double   total = s.sinks ? std::exp(sinks[head] - most) : 0.0;
            double * out   = want.data() + row * s.dv;
            for (int64_t c = 0; c < s.cells; ++c) {
                if (scores[c] == -INFINITY) {
                    continue;
                }
                const float * value  = values.data() + cell(c) * s.dv;
                const double  weight = std::exp(scores[c] - most);
                total += weight;
                for (int64_t i = 0; i < s.dv; ++i) {
                    out[i] += weight * value[i];
                }
            }
            for (int64_t i = 0; i < s.dv && total != 0.0; ++i) {
                out[i] /= total;
            }
        }
    }
};

std::vector<AttentionCase> attention_cases(Random & random, int n) {
    std::vector<AttentionCase> all;
    const auto                 add = [&](auto change) {
        AttentionSizes s;
        change(s);
        all.emplace_back(random, s);
    };
    for (const ggml_type type : kCaches) {
        add([&](auto & s) { s.k_type = s.v_type = type, s.streams = 5, s.kv_heads = 3, s.group = 3, s.cells = 301; });
        add([&](auto & s) { s.k_type = s.v_type = type, s.tokens = 19, s.cells = 257, s.ordinary = false; });
    }
    add([](auto & s) { s.tokens = 5, s.cells = 1, s.masked = false; });
    add([](auto & s) { s.tokens = 5, s.cells = 1, s.threads = 16; });
    add([](auto & s) { s.cells = 4001, s.masked = false, s.threads = 16; });
    add([](auto & s) { s.tokens = 71, s.group = 1, s.cells = 65, s.sinks = true; });
    add([](auto & s) { s.streams = 3, s.kv_heads = 1, s.group = 64, s.cells = 33, s.dk = s.dv = 16; });
    add([](auto & s) { s.kv_heads = 12, s.group = 1, s.cells = 501, s.dk = s.dv = 80, s.bias = 8.0f; });
    add([](auto & s) { s.kv_heads = 1, s.group = 5, s.tokens = 7, s.bias = 4.0f, s.sinks = true, s.threads = 3; });
    add([](auto & s) { s.streams = 2, s.tokens = 3, s.cells = 77, s.dk = 128, s.dv = 96, s.cap = 30.0f; });
    for (int i = 0; i < n; ++i) {
        AttentionSizes s;
        s.k_type                  = random.one_of(kCaches);
        s.v_type                  = random.one_of(kCaches);
        constexpr int64_t whole[] = { 32, 64, 96, 128 }, any[] = { 16, 48, 64, 80, 112, 256 };
        s.dk       = ggml_blck_size(s.k_type) == 1 && random.one_in(2) ? random.one_of(any) : random.one_of(whole);
        s.dv       = ggml_blck_size(s.v_type) == 1 && random.one_in(2) ? random.one_of(any) : random.one_of(whole);
        s.streams  = random.whole(1, 3);
        s.kv_heads = random.whole(1, 4);
        s.group    = random.whole(1, 9);
        s.cells    = random.one_in(3) ? random.whole(1, 40) : random.whole(1, 400);
        // as many tokens as the reference can compute in little time
        const int64_t most = 1500000 / (s.streams * s.kv_heads * s.group * s.cells * (s.dk + s.dv));
        s.tokens           = random.whole(1, std::max<int64_t>(1, std::min<int64_t>(most, 40)));
        s.masked           = !random.one_in(3);
        s.sinks            = random.one_in(3);
        s.bias             = s.masked && random.one_in(4) ? 8.0f : 0.0f;
        s.cap              = random.one_in(4) ? 20.0f : 0.0f;
        s.ordinary         = !random.one_in(3);
        s.threads          = some_threads(random);
        all.emplace_back(random, s);
    }
    return all;
}

// --- all of it ---

void use_and_count(const std::string & name, uint64_t ours, const char * what, const std::function<void()> & compute) {
    use(name);
    const uint64_t before = computed();
    compute();
    ++n_others;
    if (computed() - before != ours) {
        wrong("'%s': %s were computed by ours %d times, not %d", name.c_str(), what, int(computed() - before),
              int(ours));
    }
}

// wanted: the kernels that must run here, and no others; "none"; or nothing, if that is not known.
void check_all(const std::vector<std::string> & wanted) {
    std::vector<std::string> here;
    for (const std::string & name : names()) {
        printf("%s: %s\n", name.c_str(), runs_here(name) ? "runs here" : "not for this CPU");
        if (runs_here(name)) {
            here.push_back(name);
        }
    }
    printf("%d kernels for this CPU\n", int(here.size()));
    fflush(stdout);  // if an instruction is not known, this is the last that is heard
    if (!wanted.empty()) {
        expect((wanted[0] == "none" ? std::vector<std::string>() : wanted) == here, "other kernels run here");
    }

    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);  // it tells of everything that it repacks
    install();
    install();
    expect(in_use().empty(), "kernels are in use that nobody chose");
    for (const std::string & name : names()) {
        if (!runs_here(name)) {
            bool refused = false;
            try {
                use(name);
            } catch (const pyps::InputError &) {
                refused = true;
            }
            expect(refused && in_use().empty(), "kernels that cannot run here were not refused");
        }
    }

    std::vector<std::string> types_here = { "q8_0", "q5_0", "q4_0", "q4_K" };
    for (const std::string & name : here) {
        types_here = types(name);
    }
    Random random(1);

    for (const std::string & type_name : types_here) {
        const ggml_type          type  = type_of(type_name);
        std::vector<ProductCase> cases = product_cases(random, type, true, here.empty() ? 4 : 24);
        if (!here.empty()) {  // more columns than are multiplied at once
            cases.emplace_back(random, type, true, 17, ggml_blck_size(type), std::array<int64_t, 3>{ 513, 1, 1 }, false,
                               false, 3);
        }
        std::vector<ProductCase> ordinary = product_cases(random, type, false, 2);
        if (repacks(type_name)) {
            for (ProductCase & c : product_cases(random, type, true, 6, true)) {
                cases.push_back(std::move(c));
            }
            for (ProductCase & c : product_cases(random, type, false, 2, true)) {
                ordinary.push_back(std::move(c));
            }
        }
        for (const std::string & name : here) {
            use(name);
            for (const ProductCase & c : cases) {
                c.check_ours(name.c_str());
            }
        }
        use_and_count("", 0, type_name.c_str(), [&] {
            for (const ProductCase & c : ordinary) {
                c.check("ggml", kGgmls);
            }
        });
    }
    // weights that are not for us
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q3_K }) {
        for (const ProductCase & c : product_cases(random, type, false, 2)) {
            use_and_count(here.empty() ? "" : here[0], 0, ggml_type_name(type), [&] { c.check("ggml", kGgmls); });
        }
    }

    const std::vector<AttentionCase> attentions = attention_cases(random, here.empty() ? 4 : 100);
    for (const std::string & name : here) {
        use_and_count(name, attentions.size(), "attentions", [&] {
            for (const AttentionCase & c : attentions) {
                c.check(name.c_str(), 2 * kExact);
            }
        });
    }
    use_and_count("", 0, "attentions", [&] {
        for (const AttentionCase & c : attentions) {
            if (c.s.ordinary) {
                c.check("ggml", kGgmlsAttention);
            }
        }
    });
    AttentionSizes odd;
    odd.dk = odd.dv = 40;  // no whole registers
    AttentionSizes wide;
    wide.kv_heads = 1;
    wide.group    = kMaxRows + 1;
    for (const AttentionSizes & sizes : { odd, wide }) {
        const AttentionCase c(random, sizes);
        use_and_count(here.empty() ? "" : here[0], 0, "attentions that are not for us",
                      [&] { c.check("ggml", kGgmlsAttention); });
    }

    // nodes of several threads at once, while others are chosen
    std::vector<ProductCase> products;
    for (const std::string & type_name : types_here) {
        for (ProductCase & c : product_cases(random, type_of(type_name), false, 1)) {
            products.push_back(std::move(c));
        }
    }
    std::atomic<bool>        done{ false };
    std::vector<std::thread> workers;
    std::thread              chooser([&] {
        while (!done) {
            use("");
            for (const std::string & name : here) {
                std::this_thread::yield();
                use(name);
            }
        }
    });
    for (int i = 0; i < 4; ++i) {
        workers.emplace_back([&, i] {
            for (int round = 0; round < 2; ++round) {
                for (size_t c = 0; c < products.size(); ++c) {
                    products[(c + i) % products.size()].check("any", kGgmls);
                    const AttentionCase & attention = attentions[(c * 7 + i) % attentions.size()];
                    if (attention.s.ordinary) {
                        attention.check("any", kGgmlsAttention);
                    }
                }
            }
        });
    }
    for (std::thread & worker : workers) {
        worker.join();
    }
    done = true;
    chooser.join();
    use("");
}

}  // namespace

int main(int argc, char ** argv) {
    try {
        check_all({ argv + 1, argv + argc });
    } catch (const std::exception & e) {
        wrong("%s", e.what());
    }
    printf("%d products (%d with repacked weights), %d attentions and %d other checks; %d wrong\n", n_products.load(),
           n_repacked.load(), n_attentions.load(), n_others.load(), n_wrong.load());
    return n_wrong.load() == 0 ? 0 : 1;
}
