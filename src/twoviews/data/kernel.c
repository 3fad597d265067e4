// Views of a batch of images, made one after the other while they are in the cache: what views.py and pixels.py say in
// tensors, with the same numbers. Between its two passes the resampling turns the plane, so that both run along the
// memory and fill vector registers.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline float unit(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
static inline float least(float a, float b) { return a < b ? a : b; }
static inline float most(float a, float b) { return a > b ? a : b; }

typedef struct {
    int *first;          // [size]: the first input px that an output px is made of; it and those behind it
    float *weight;       // [count][size]
    int count, low, high; // of input px for each output px; all of them: low <= px < high
} Taps;

// Triangles as wide as an output px, at least an input px, weighed by the part of each px that the box covers, or with
// `bleed` reaching out of it; of sum `scale`.
static void triangles(Taps *taps, float start, float extent, int side, int size, int bleed, int mirrored, float scale)
{
    float step = extent / size, reach = step > 1 ? step : 1, sum[size];
    int count = (int)ceilf(2 * reach), *restrict first = taps->first;
    count = count > side ? side : count;
    taps->count = count, taps->low = side, taps->high = 0;
    for (int i = 0; i < size; i++) {
        float centre = (mirrored ? size - (i + 0.5f) : i + 0.5f) * step;
        int from = (int)floorf(start + centre - reach - 0.5f) + 1;
        first[i] = from < 0 ? 0 : from > side - count ? side - count : from;
        sum[i] = 0;
    }
    for (int k = 0; k < count; k++) {
        float *restrict weight = taps->weight + (int64_t)k * size;
        for (int i = 0; i < size; i++) {
            float centre = (mirrored ? size - (i + 0.5f) : i + 0.5f) * step, edge = first[i] + k - start;
            float covered = bleed ? 1 : unit(least(edge + 1, extent) - most(edge, 0));
            weight[i] = most(reach - fabsf(edge + 0.5f - centre), 0) * covered;
            sum[i] += weight[i];
        }
    }
    for (int k = 0; k < count; k++) {
        float *restrict weight = taps->weight + (int64_t)k * size;
        for (int i = 0; i < size; i++) weight[i] *= scale / sum[i];
    }
    for (int i = 0; i < size; i++) {
        taps->low = first[i] < taps->low ? first[i] : taps->low;
        taps->high = first[i] + count > taps->high ? first[i] + count : taps->high;
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EIGHT 8
typedef float Eight __attribute__((vector_size(32), aligned(4)));

static inline void turn(const float *from, int64_t from_row, float *to, int64_t to_row)
{
    Eight a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = *(const Eight *)(from + i * from_row);
    for (int i = 0; i < 8; i += 2) {
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            a[i + j + 2] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        *(Eight *)(to + i * to_row) = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(Eight *)(to + (i + 4) * to_row) = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
#endif
#endif

// to[j][i] = from[i][j]
static void transpose(const float *from, int rows, int columns, float *to)
{
    int i = 0;
#ifdef EIGHT
    for (; i + 8 <= rows; i += 8) {
        int j = 0;
        for (; j + 8 <= columns; j += 8)
            turn(from + (int64_t)i * columns + j, columns, to + (int64_t)j * rows + i, rows);
        for (; j < columns; j++)
            for (int k = i; k < i + 8; k++) to[(int64_t)j * rows + k] = from[(int64_t)k * columns + j];
    }
#endif
    for (; i < rows; i++)
        for (int j = 0; j < columns; j++) to[(int64_t)j * rows + i] = from[(int64_t)i * columns + j];
}

// Grey of pixel i: luma of RGB, of other numbers of channels their mean.
static void grey(const float *restrict x, float *restrict g, int64_t plane, int channels)
{
    if (channels == 3) {
        for (int64_t i = 0; i < plane; i++) g[i] = 0.2989f * x[i] + 0.587f * x[plane + i] + 0.114f * x[2 * plane + i];
        return;
    }
    memset(g, 0, plane * sizeof *g);
    for (int c = 0; c < channels; c++)
        for (int64_t i = 0; i < plane; i++) g[i] += x[c * plane + i] / channels;
}

static void brightness(float *x, int64_t n, float factor)
{
    for (int64_t i = 0; i < n; i++) x[i] = unit(x[i] * factor);
}

static void contrast(float *restrict x, float *restrict g, int64_t plane, int channels, float factor)
{
    grey(x, g, plane, channels);
    double sum = 0;
    for (int64_t i = 0; i < plane; i += 64) { // in short stretches, of which each keeps its digits
        float part = 0;
        for (int64_t j = i; j < plane && j < i + 64; j++) part += g[j];
        sum += part;
    }
    float rest = (float)(sum / plane) * (1 - factor);
    for (int64_t i = 0; i < plane * channels; i++) x[i] = unit(x[i] * factor + rest);
}

static void saturation(float *restrict x, float *restrict g, int64_t plane, float factor)
{
    grey(x, g, plane, 3);
    for (int c = 0; c < 3; c++)
        for (int64_t i = 0; i < plane; i++) x[c * plane + i] = unit(x[c * plane + i] * factor + g[i] * (1 - factor));
}

static void hue(float *restrict x, int64_t plane, float turn)
{
    float *restrict red = x, *restrict green = x + plane, *restrict blue = x + 2 * plane;
    for (int64_t i = 0; i < plane; i++) {
        float r = red[i], g = green[i], b = blue[i];
        float value = most(most(r, g), b), chroma = value - least(least(r, g), b);
        float sixth = 1 / (most(chroma, 1.17549435e-38f) * 6);
        float of_red = (g - b) * sixth, of_green = (b - r) * sixth + 1.0f / 3, of_blue = (r - g) * sixth + 2.0f / 3;
        float angle = (value == r ? of_red : value == g ? of_green : of_blue) + turn;
        float to_red = angle, to_green = angle - 1.0f / 3, to_blue = angle - 2.0f / 3;
        to_red = fabsf(to_red - rintf(to_red)), to_green = fabsf(to_green - rintf(to_green));
        to_blue = fabsf(to_blue - rintf(to_blue));
        red[i] = value - unit(to_red * 6 - 1) * chroma;
        green[i] = value - unit(to_green * 6 - 1) * chroma;
        blue[i] = value - unit(to_blue * 6 - 1) * chroma;
    }
}

static int reflected(int i, int size) { i = abs(i); return size - 1 - abs(size - 1 - i); }

static void blur(float *restrict x, float *restrict other, int channels, int size, float sigma)
{
    int radius = size / 20 > 1 ? size / 20 : 1;
    float tap[2 * radius + 1], sum = 0, line[size + 2 * radius];
    for (int k = -radius; k <= radius; k++) sum += tap[k + radius] = expf(-0.5f * (k / sigma) * (k / sigma));
    for (int k = 0; k <= 2 * radius; k++) tap[k] /= sum;
    for (int c = 0; c < channels; c++) {
        float *plane = x + (int64_t)c * size * size;
        for (int i = 0; i < size; i++) {
            float *restrict row = other + (int64_t)i * size;
            for (int j = 0; j < size; j++) row[j] = tap[radius] * plane[(int64_t)i * size + j];
            for (int k = 1; k <= radius; k++) {
                const float *restrict above = plane + (int64_t)reflected(i - k, size) * size, w = tap[radius + k];
                const float *restrict below = plane + (int64_t)reflected(i + k, size) * size;
                for (int j = 0; j < size; j++) row[j] += w * (above[j] + below[j]);
            }
        }
        for (int i = 0; i < size; i++) {
            const float *from = other + (int64_t)i * size;
            float *restrict row = plane + (int64_t)i * size;
            memcpy(line + radius, from, size * sizeof *line);
            for (int j = 1; j <= radius; j++) {
                line[radius - j] = from[reflected(-j, size)];
                line[radius + size - 1 + j] = from[reflected(size - 1 + j, size)];
            }
            for (int j = 0; j < size; j++) row[j] = tap[radius] * line[j + radius];
            for (int k = 1; k <= radius; k++)
                for (int j = 0; j < size; j++) row[j] += tap[radius + k] * (line[j + radius - k] + line[j + radius + k]);
        }
    }
}

static void resample(const uint8_t *image, int channels, int side, int size, const Taps *down, const Taps *across,
                     float *restrict rows, float *restrict turned, float *restrict x)
{
    int low = across->low, width = across->high - low;
    for (int c = 0; c < channels; c++) {
        for (int y = 0; y < size; y++) {
            const uint8_t *from = image + ((int64_t)c * side + down->first[y]) * side + low;
            float *restrict row = rows + (int64_t)y * width, w = down->weight[y];
            for (int j = 0; j < width; j++) row[j] = w * from[j];
            for (int k = 1; k < down->count; k++) {
                w = down->weight[(int64_t)k * size + y], from += side;
                for (int j = 0; j < width; j++) row[j] += w * from[j];
            }
        }
        transpose(rows, size, width, turned);
        for (int i = 0; i < size; i++) {
            const float *from = turned + (int64_t)(across->first[i] - low) * size;
            float *restrict row = rows + (int64_t)i * size, w = across->weight[i];
            for (int y = 0; y < size; y++) row[y] = w * from[y];
            for (int k = 1; k < across->count; k++) {
                w = across->weight[(int64_t)k * size + i], from += size;
                for (int y = 0; y < size; y++) row[y] += w * from[y];
            }
        }
        transpose(rows, size, size, x + (int64_t)c * size * size);
    }
}

// Images first to last of a batch; arrays as in views.py, order -1 for nothing. 0, or 1 when there is no memory.
int render(const uint8_t *images, int64_t first, int64_t last, int channels, int side, int size, int bleed,
           const float *start, const float *extent, const uint8_t *flip, const int64_t *order, const float *factors,
           const uint8_t *grayscale, const float *sigma, const uint8_t *solarize, float solarize_from,
           const float *mean, const float *std, float *out)
{
    int64_t plane = (int64_t)size * size, between = (int64_t)size * (side > size ? side : size);
    float widest = 1;
    for (int64_t i = 2 * first; i < 2 * last; i++) widest = most(widest, extent[i] / size);
    int64_t room = (int64_t)size * ((int)ceilf(2 * widest) + 1);
    int *numbers = malloc(2 * size * sizeof *numbers);
    float *floats = malloc((2 * room + 2 * between + (channels + 1) * plane) * sizeof *floats);
    if (!numbers || !floats) {
        free(numbers), free(floats);
        return 1;
    }
    Taps down = {numbers, floats, 0, 0, 0}, across = {numbers + size, floats + room, 0, 0, 0};
    float *rows = floats + 2 * room, *turned = rows + between, *x = turned + between, *g = x + channels * plane;
    for (int64_t n = first; n < last; n++) {
        triangles(&down, start[2 * n], extent[2 * n], side, size, bleed, 0, 1.0f / 255);
        triangles(&across, start[2 * n + 1], extent[2 * n + 1], side, size, bleed, flip[n], 1);
        resample(images + n * channels * side * side, channels, side, size, &down, &across, rows, turned, x);
        for (int s = 0; s < 4; s++) {
            int64_t operation = order[4 * n + s];
            if (operation < 0) continue;
            float factor = factors[4 * n + operation];
            if (operation == 0) brightness(x, channels * plane, factor);
            if (operation == 1) contrast(x, g, plane, channels, factor);
            if (operation == 2) saturation(x, g, plane, factor);
            if (operation == 3) hue(x, plane, factor);
        }
        if (grayscale[n]) {
            grey(x, g, plane, channels);
            for (int c = 0; c < channels; c++) memcpy(x + c * plane, g, plane * sizeof *x);
        }
        if (sigma[n] > 0) blur(x, g, channels, size, sigma[n]);
        if (solarize[n])
            for (int64_t i = 0; i < channels * plane; i++) x[i] = x[i] >= solarize_from ? 1 - x[i] : x[i];
        for (int c = 0; c < channels; c++) {
            float *restrict to = out + (n * channels + c) * plane, shift = mean[c], scale = 1 / std[c];
            for (int64_t i = 0; i < plane; i++) to[i] = (x[c * plane + i] - shift) * scale;
        }
    }
    free(numbers), free(floats);
    return 0;
}
