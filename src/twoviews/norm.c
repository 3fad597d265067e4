// Batch norm, the residual behind it and ReLU, on activations in channels_last: rows of channels, [N * H * W, C] in memory,
// where image n is in part n mod `parts`. Statistics and all arithmetic are float32, activations float32 or bfloat16.
//
// Sums are taken in blocks of rows and chunks of images that depend on the shape alone, so that results are the same for
// all numbers of threads.

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define ROWS 64 // of a block

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// Of one layer: images of each part, rows of an image, channels, parts, chunks of the images of a part, and whether
// activations are bfloat16.
typedef struct {
    int64_t images, size, channels, parts, chunks, bf16;
} Layer;

INLINE Floats load_floats(const float *x, int lanes)
{
    Floats value = {0};
    memcpy(&value, x, 4 * lanes);
    return value;
}

INLINE void store_floats(float *x, Floats value, int lanes) { memcpy(x, &value, 4 * lanes); }

INLINE Floats load(const void *x, int64_t at, int lanes, int bf16)
{
    if (!bf16) return load_floats((const float *)x + at, lanes);
    Halves halves = {0};
    memcpy(&halves, (const uint16_t *)x + at, 2 * lanes);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// To the nearest, of two to the even one.
INLINE void store(void *x, int64_t at, Floats value, int lanes, int bf16)
{
    if (!bf16) {
        store_floats((float *)x + at, value, lanes);
        return;
    }
#ifdef __AVX512BF16__
    Halves halves = (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    Words bits = (Words)value, none = (Words)(value != value);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    Halves halves = __builtin_convertvector((bits & ~none) | (none & 0x7fc0), Halves);
#endif
    memcpy((uint16_t *)x + at, &halves, 2 * lanes);
}

// value where `by` is above 0 or no number, else 0
INLINE Floats open(Floats value, Floats by) { return (Floats)((Words)value & ~(Words)(by <= 0)); }

// function(c, vectors, lanes, ...) for all channels: as many as four vectors at once, and what is less than one last.
#define EACH_COLUMN(function, ...)                                                                                      \
    do {                                                                                                                \
        int64_t c = 0;                                                                                                  \
        for (; c + 4 * LANES <= channels; c += 4 * LANES) function(c, 4, LANES, __VA_ARGS__);                           \
        for (; c + 2 * LANES <= channels; c += 2 * LANES) function(c, 2, LANES, __VA_ARGS__);                           \
        for (; c + LANES <= channels; c += LANES) function(c, 1, LANES, __VA_ARGS__);                                   \
        if (c < channels) function(c, 1, channels - c, __VA_ARGS__);                                                    \
    } while (0)

// function(..., bf16, relu, residual) with constants
#define VARIANT(function, bf16, relu, residual, ...)                                                                    \
    switch ((bf16 ? 4 : 0) + (relu ? 2 : 0) + (residual ? 1 : 0)) {                                                     \
    case 0: EACH_COLUMN(function, __VA_ARGS__, 0, 0, 0); break;                                                         \
    case 1: EACH_COLUMN(function, __VA_ARGS__, 0, 0, 1); break;                                                         \
    case 2: EACH_COLUMN(function, __VA_ARGS__, 0, 1, 0); break;                                                         \
    case 3: EACH_COLUMN(function, __VA_ARGS__, 0, 1, 1); break;                                                         \
    case 4: EACH_COLUMN(function, __VA_ARGS__, 1, 0, 0); break;                                                         \
    case 5: EACH_COLUMN(function, __VA_ARGS__, 1, 0, 1); break;                                                         \
    case 6: EACH_COLUMN(function, __VA_ARGS__, 1, 1, 0); break;                                                         \
    case 7: EACH_COLUMN(function, __VA_ARGS__, 1, 1, 1); break;                                                         \
    }

// `row` and `rows` of each block of the images `from` to `to` of a part.
#define EACH_BLOCK(layer, part, from, to)                                                                               \
    for (int64_t span = (layer)->parts == 1 ? (to) - (from) : 1, image = (from); image < (to); image += span)           \
        for (int64_t row = (image * (layer)->parts + (part)) * (layer)->size, end = row + span * (layer)->size, rows;   \
             rows = end - row < ROWS ? end - row : ROWS, row < end; row += rows)

// Adds mean and sum of squares around it of a block to those of `before` rows (Chan, Golub and LeVeque, 1983). Within the
// block, sums are of differences from its first row, which is no farther from the mean than sqrt(rows) deviations: so few
// digits cancel.
INLINE void statistics_columns(int64_t c, int vectors, int lanes, const void *x, int64_t row, int64_t rows,
                               int64_t channels, float before, float *means, float *squares, int bf16)
{
    Floats shift[4], sum[4] = {{0}}, square[4] = {{0}};
    int64_t at = row * channels + c;
    for (int v = 0; v < vectors; v++) shift[v] = load(x, at + v * LANES, lanes, bf16);
    for (int64_t r = 0; r < rows; r++, at += channels)
        for (int v = 0; v < vectors; v++) {
            Floats apart = load(x, at + v * LANES, lanes, bf16) - shift[v];
            sum[v] += apart;
            square[v] += apart * apart;
        }
    float share = rows / (before + rows);
    for (int v = 0; v < vectors; v++) {
        float *mean = means + c + v * LANES, *its_square = squares + c + v * LANES;
        Floats old = load_floats(mean, lanes), delta = shift[v] + sum[v] / (float)rows - old;
        Floats around = square[v] - sum[v] * sum[v] / (float)rows;
        store_floats(mean, old + delta * share, lanes);
        store_floats(its_square, load_floats(its_square, lanes) + around + delta * delta * (before * share), lanes);
    }
}

// Of tasks (part, chunk) `first` to `last`, into partial [2, parts, chunks, C].
int statistics(int64_t first, int64_t last, const Layer *layer, const void *x, float *partial)
{
    int64_t channels = layer->channels, chunks = layer->chunks;
    for (int64_t task = first; task < last; task++) {
        int64_t part = task / chunks, chunk = task % chunks, before = 0;
        float *means = partial + task * channels, *squares = means + layer->parts * chunks * channels;
        memset(means, 0, channels * sizeof *means), memset(squares, 0, channels * sizeof *squares);
        EACH_BLOCK(layer, part, layer->images * chunk / chunks, layer->images * (chunk + 1) / chunks)
        {
            if (layer->bf16) EACH_COLUMN(statistics_columns, x, row, rows, channels, before, means, squares, 1);
            else EACH_COLUMN(statistics_columns, x, row, rows, channels, before, means, squares, 0);
            before += rows;
        }
    }
    return 0;
}

// Mean and 1 / sqrt(variance + eps) of each part: moments [2, parts, C]; and the running statistics, which get the mean
// over the parts of what the batch norm of each would make of them.
void finish_statistics(const Layer *layer, const float *partial, float *moments, float *restrict running_mean,
                       float *restrict running_var, float momentum, float eps)
{
    int64_t channels = layer->channels, chunks = layer->chunks, parts = layer->parts;
    float rows = layer->images * layer->size, share = momentum / parts;
    for (int64_t c = 0; c < channels; c++) running_mean[c] *= 1 - momentum, running_var[c] *= 1 - momentum;
    for (int64_t part = 0; part < parts; part++) {
        float *restrict mean = moments + part * channels, *restrict rstd = mean + parts * channels, before = 0;
        memset(mean, 0, channels * sizeof *mean), memset(rstd, 0, channels * sizeof *rstd);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const float *restrict its_mean = partial + (part * chunks + chunk) * channels;
            const float *restrict square = its_mean + parts * chunks * channels;
            float count = (layer->images * (chunk + 1) / chunks - layer->images * chunk / chunks) * layer->size;
            float weight = count / (before + count);
            for (int64_t c = 0; c < channels; c++) {
                float delta = its_mean[c] - mean[c];
                mean[c] += delta * weight;
                rstd[c] += square[c] + delta * delta * (before * weight);
            }
            before += count;
        }
        for (int64_t c = 0; c < channels; c++) {
            running_mean[c] += share * mean[c];
            running_var[c] += share * (rstd[c] / (rows - 1));
            rstd[c] = 1 / sqrtf(rstd[c] / rows + eps);
        }
    }
}

INLINE void normalise_columns(int64_t c, int vectors, int lanes, const void *x, const void *other, void *y,
                              const float *weight, const float *bias, const float *mean, const float *rstd, int64_t row,
                              int64_t rows, int64_t channels, int bf16, int relu, int residual)
{
    Floats centre[4], scale[4], offset[4];
    for (int v = 0; v < vectors; v++) {
        int64_t i = c + v * LANES;
        centre[v] = load_floats(mean + i, lanes), offset[v] = load_floats(bias + i, lanes);
        scale[v] = load_floats(weight + i, lanes) * load_floats(rstd + i, lanes);
    }
    int64_t at = row * channels + c;
    for (int64_t r = 0; r < rows; r++, at += channels)
        for (int v = 0; v < vectors; v++) {
            int64_t i = at + v * LANES;
            Floats value = (load(x, i, lanes, bf16) - centre[v]) * scale[v] + offset[v];
            if (residual) value += load(other, i, lanes, bf16);
            store(y, i, relu ? open(value, value) : value, lanes, bf16);
        }
}

// y of images `first` to `last` of those of each part; `residual` may be 0.
int normalise(int64_t first, int64_t last, const Layer *layer, const void *x, const void *residual, void *y,
              const float *weight, const float *bias, const float *moments, int relu)
{
    int64_t channels = layer->channels;
    for (int64_t part = 0; part < layer->parts; part++) {
        const float *mean = moments + part * channels, *rstd = mean + layer->parts * channels;
        EACH_BLOCK(layer, part, first, last)
        {
            VARIANT(normalise_columns, layer->bf16, relu, residual, x, residual, y, weight, bias, mean, rstd, row, rows,
                    channels)
        }
    }
    return 0;
}

// g is the gradient below the ReLU. Without a residual the input says where the ReLU is open; with one the output does,
// and g is written to `masked`: it is the residual's gradient, and `input_gradient` reads it instead of gradient and output.
INLINE void sums_columns(int64_t c, int vectors, int lanes, const void *x, const void *grad, const void *y, void *masked,
                         const float *weight, const float *bias, const float *mean, const float *rstd, float *totals,
                         float *products, int64_t row, int64_t rows, int64_t channels, int bf16, int relu, int residual)
{
    Floats centre[4], scale[4], offset[4], total[4] = {{0}}, product[4] = {{0}};
    for (int v = 0; v < vectors; v++) {
        int64_t i = c + v * LANES;
        centre[v] = load_floats(mean + i, lanes), offset[v] = load_floats(bias + i, lanes);
        scale[v] = load_floats(weight + i, lanes) * load_floats(rstd + i, lanes);
    }
    int64_t at = row * channels + c;
    for (int64_t r = 0; r < rows; r++, at += channels)
        for (int v = 0; v < vectors; v++) {
            int64_t i = at + v * LANES;
            Floats g = load(grad, i, lanes, bf16), value = load(x, i, lanes, bf16) - centre[v];
            if (relu && residual) {
                g = open(g, load(y, i, lanes, bf16));
                store(masked, i, g, lanes, bf16);
            } else if (relu)
                g = open(g, value * scale[v] + offset[v]);
            total[v] += g;
            product[v] += g * value;
        }
    for (int v = 0; v < vectors; v++) {
        float *all = totals + c + v * LANES, *all_products = products + c + v * LANES;
        store_floats(all, load_floats(all, lanes) + total[v], lanes);
        store_floats(all_products, load_floats(all_products, lanes) + product[v], lanes);
    }
}

// Sums of g and of g * (x - mean) of tasks (part, chunk) `first` to `last`: partial [2, parts, chunks, C]. `y` and `masked`
// are 0 but behind a residual and ReLU.
int sums(int64_t first, int64_t last, const Layer *layer, const void *x, const void *grad, const void *y, void *masked,
         const float *weight, const float *bias, const float *moments, float *partial, int relu)
{
    int64_t channels = layer->channels, chunks = layer->chunks;
    for (int64_t task = first; task < last; task++) {
        int64_t part = task / chunks, chunk = task % chunks;
        const float *mean = moments + part * channels, *rstd = mean + layer->parts * channels;
        float *totals = partial + task * channels, *products = totals + layer->parts * chunks * channels;
        memset(totals, 0, channels * sizeof *totals), memset(products, 0, channels * sizeof *products);
        EACH_BLOCK(layer, part, layer->images * chunk / chunks, layer->images * (chunk + 1) / chunks)
        {
            VARIANT(sums_columns, layer->bf16, relu, y, x, grad, y, masked, weight, bias, mean, rstd, totals, products, row,
                    rows, channels)
        }
    }
    return 0;
}

// What `input_gradient` multiplies x - mean by, and what it subtracts: factors [2, parts, C]; and two gradients.
void finish_sums(const Layer *layer, const float *partial, const float *moments, const float *weight, float *factors,
                 float *restrict weight_grad, float *restrict bias_grad)
{
    int64_t channels = layer->channels, chunks = layer->chunks, parts = layer->parts;
    float rows = layer->images * layer->size;
    memset(weight_grad, 0, channels * sizeof *weight_grad), memset(bias_grad, 0, channels * sizeof *bias_grad);
    for (int64_t part = 0; part < parts; part++) {
        const float *restrict rstd = moments + (parts + part) * channels;
        float *restrict slope = factors + part * channels, *restrict level = slope + parts * channels;
        memset(slope, 0, channels * sizeof *slope), memset(level, 0, channels * sizeof *level);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const float *restrict total = partial + (part * chunks + chunk) * channels;
            const float *restrict product = total + parts * chunks * channels;
            for (int64_t c = 0; c < channels; c++) level[c] += total[c], slope[c] += product[c];
        }
        for (int64_t c = 0; c < channels; c++) {
            float scale = weight[c] * rstd[c], product = slope[c] * rstd[c]; // with the normalised input
            weight_grad[c] += product;
            bias_grad[c] += level[c];
            slope[c] = scale * rstd[c] * product / rows;
            level[c] = scale * level[c] / rows;
        }
    }
}

INLINE void gradient_columns(int64_t c, int vectors, int lanes, const void *x, const void *grad, void *out,
                             const float *weight, const float *bias, const float *mean, const float *rstd,
                             const float *slopes, const float *levels, int64_t row, int64_t rows, int64_t channels,
                             int bf16, int relu, int residual)
{
    (void)residual;
    Floats centre[4], scale[4], offset[4], slope[4], level[4];
    for (int v = 0; v < vectors; v++) {
        int64_t i = c + v * LANES;
        centre[v] = load_floats(mean + i, lanes), offset[v] = load_floats(bias + i, lanes);
        scale[v] = load_floats(weight + i, lanes) * load_floats(rstd + i, lanes);
        slope[v] = load_floats(slopes + i, lanes), level[v] = load_floats(levels + i, lanes);
    }
    int64_t at = row * channels + c;
    for (int64_t r = 0; r < rows; r++, at += channels)
        for (int v = 0; v < vectors; v++) {
            int64_t i = at + v * LANES;
            Floats g = load(grad, i, lanes, bf16), value = load(x, i, lanes, bf16) - centre[v];
            if (relu) g = open(g, value * scale[v] + offset[v]);
            store(out, i, scale[v] * g - slope[v] * value - level[v], lanes, bf16);
        }
}

// The gradient of x of images `first` to `last` of those of each part; relu: `grad` is that of the output of a ReLU that
// the input says is open or not.
int input_gradient(int64_t first, int64_t last, const Layer *layer, const void *x, const void *grad, void *out,
                   const float *weight, const float *bias, const float *moments, const float *factors, int relu)
{
    int64_t channels = layer->channels;
    for (int64_t part = 0; part < layer->parts; part++) {
        const float *mean = moments + part * channels, *rstd = mean + layer->parts * channels;
        const float *slope = factors + part * channels, *level = slope + layer->parts * channels;
        EACH_BLOCK(layer, part, first, last)
        {
            VARIANT(gradient_columns, layer->bf16, relu, 0, x, grad, out, weight, bias, mean, rstd, slope, level, row, rows,
                    channels)
        }
    }
    return 0;
}
