// Views of a batch of images on a GPU: kernel.c once more, with a block of threads for each image. A thread keeps to its
// own px, each blockDim.x-th of the view in all channels, from the resampling to the end. So a barrier stands only where
// one reads what others wrote: the taps, the mean grey, and the neighbours that a blur takes in. Any blockDim.x is right.

static __device__ inline float unit(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
static __device__ inline float least(float a, float b) { return a < b ? a : b; }
static __device__ inline float most(float a, float b) { return a > b ? a : b; }

struct Taps {
    int *first;    // [size]: the first input px that an output px is made of; it and those behind it
    float *weight; // [count][size]
    int count;     // of input px for each output px
};

// As in kernel.c: triangles as wide as an output px, at least an input px, weighed by the part of each px that the box
// covers, or with `bleed` reaching out of it; of sum `scale`.
static __device__ void triangles(Taps *taps, float start, float extent, int side, int size, int bleed, int mirrored,
                                 float scale)
{
    float step = extent / size, reach = step > 1 ? step : 1;
    int count = (int)ceilf(2 * reach);
    taps->count = count = count > side ? side : count;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        float centre = (mirrored ? size - (i + 0.5f) : i + 0.5f) * step, sum = 0, *weight = taps->weight + i;
        int from = (int)floorf(start + centre - reach - 0.5f) + 1;
        taps->first[i] = from = from < 0 ? 0 : from > side - count ? side - count : from;
        for (int k = 0; k < count; k++) {
            float edge = from + k - start;
            float covered = bleed ? 1 : unit(least(edge + 1, extent) - most(edge, 0));
            weight[k * size] = most(reach - fabsf(edge + 0.5f - centre), 0) * covered;
            sum += weight[k * size];
        }
        for (int k = 0; k < count; k++) weight[k * size] *= scale / sum;
    }
}

static __device__ void resample(const unsigned char *image, int channels, int side, int size, Taps down, Taps across,
                                float *x)
{
    int plane = size * size;
    for (int i = threadIdx.x; i < plane; i += blockDim.x) {
        int y = i / size, column = i % size;
        for (int c = 0; c < channels; c++) {
            const unsigned char *from = image + ((long long)c * side + down.first[y]) * side + across.first[column];
            float sum = 0;
            for (int k = 0; k < down.count; k++, from += side) {
                float row = 0;
                for (int j = 0; j < across.count; j++) row += across.weight[j * size + column] * from[j];
                sum += down.weight[k * size + y] * row;
            }
            x[c * plane + i] = sum;
        }
    }
}

// Grey of a px: luma of RGB, of other numbers of channels their mean.
static __device__ inline float grey(const float *x, int plane, int channels)
{
    if (channels == 3) return 0.2989f * x[0] + 0.587f * x[plane] + 0.114f * x[2 * plane];
    float g = 0;
    for (int c = 0; c < channels; c++) g += x[c * plane] / channels;
    return g;
}

static __device__ void brightness(float *x, int plane, int channels, float factor)
{
    for (int i = threadIdx.x; i < plane; i += blockDim.x)
        for (int c = 0; c < channels; c++) x[c * plane + i] = unit(x[c * plane + i] * factor);
}

// `part` has room for a number of each thread.
static __device__ void contrast(float *x, double *part, int plane, int channels, float factor)
{
    double sum = 0;
    for (int i = threadIdx.x; i < plane; i += 64 * blockDim.x) { // in short stretches, of which each keeps its digits
        float few = 0;
        for (int j = i; j < plane && j < i + 64 * blockDim.x; j += blockDim.x) few += grey(x + j, plane, channels);
        sum += few;
    }
    part[threadIdx.x] = sum;
    __syncthreads();
    for (int left = blockDim.x, half; left > 1; left = half) {
        half = (left + 1) / 2;
        if (threadIdx.x + half < left) part[threadIdx.x] += part[threadIdx.x + half];
        __syncthreads();
    }
    float rest = (float)(part[0] / plane) * (1 - factor);
    for (int i = threadIdx.x; i < plane; i += blockDim.x)
        for (int c = 0; c < channels; c++) x[c * plane + i] = unit(x[c * plane + i] * factor + rest);
}

static __device__ void saturation(float *x, int plane, float factor)
{
    for (int i = threadIdx.x; i < plane; i += blockDim.x) {
        float rest = grey(x + i, plane, 3) * (1 - factor);
        for (int c = 0; c < 3; c++) x[c * plane + i] = unit(x[c * plane + i] * factor + rest);
    }
}

static __device__ void hue(float *x, int plane, float turn)
{
    float *red = x, *green = x + plane, *blue = x + 2 * plane;
    for (int i = threadIdx.x; i < plane; i += blockDim.x) {
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

static __device__ void grayscale(float *x, int plane, int channels)
{
    for (int i = threadIdx.x; i < plane; i += blockDim.x) {
        float g = grey(x + i, plane, channels);
        for (int c = 0; c < channels; c++) x[c * plane + i] = g;
    }
}

static __device__ inline int reflected(int i, int size) { i = abs(i); return size - 1 - abs(size - 1 - i); }

// Px `at` of a line of px that lie `apart`, blurred; tap[k] weighs those k px away.
static __device__ inline float blurred(const float *line, int at, int apart, int size, const float *tap, int radius)
{
    float sum = tap[0] * line[at * apart];
    for (int k = 1; k <= radius; k++)
        sum += tap[k] * (line[reflected(at - k, size) * apart] + line[reflected(at + k, size) * apart]);
    return sum;
}

static __device__ void blur(float *x, float *other, float *tap, int channels, int size, float sigma)
{
    int radius = size / 20 > 1 ? size / 20 : 1, plane = size * size;
    for (int k = threadIdx.x; k <= radius; k += blockDim.x) tap[k] = expf(-0.5f * (k / sigma) * (k / sigma));
    __syncthreads();
    float sum = tap[0];
    for (int k = 1; k <= radius; k++) sum += 2 * tap[k];
    float scale = 1 / sum;
    for (int i = threadIdx.x; i < plane; i += blockDim.x)
        for (int c = 0; c < channels; c++)
            other[c * plane + i] = scale * blurred(x + c * plane + i % size, i / size, size, size, tap, radius);
    __syncthreads();
    for (int i = threadIdx.x; i < plane; i += blockDim.x)
        for (int c = 0; c < channels; c++)
            x[c * plane + i] = scale * blurred(other + c * plane + i / size * size, i % size, 1, size, tap, radius);
}

union Bits { float value; unsigned bits; };

// The bits of the nearest number of 16 bits, of two the even one; without CUDA's headers, which NVRTC may lack.
static __device__ inline unsigned short bfloat16(float x)
{
    Bits u = {x};
    return x != x ? 0x7fc0 : (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16;
}

static __device__ inline unsigned short float16(float x)
{
    Bits u = {x};
    unsigned sign = u.bits >> 16 & 0x8000;
    u.bits &= 0x7fffffff;
    if (!(u.value < 65520)) return sign | (x != x ? 0x7e00 : 0x7c00);
    if (u.value < 6.103515625e-5f) { // subnormal: the last bit of numbers from 0.5 on is as large as that of half
        u.value += 0.5f;
        return sign | (u.bits - 0x3f000000);
    }
    u.bits += 0xfff + (u.bits >> 13 & 1);
    return sign | (u.bits - 0x38000000) >> 13;
}

// Block n makes a view of image n % images_count. A row of `drawn` has what views.py draws for it, as the lines below take
// it apart (order -1 for nothing), and the statistics of the channels. `x`, of float [blocks][channels][size][size], is what
// it works on; `other` is as large where a sigma is above 0. `out` may be `x` if it has the same form: numbers are of 32
// bits, with `form` 1 bfloat16 and with 2 half, and with `channels_last` those of a px lie side by side.
extern "C" __global__ void __launch_bounds__(512)
render(const unsigned char *images, const float *drawn, int images_count, int channels, int side, int size, int bleed,
       double solarize_from, int form, int channels_last, float *other, float *x, void *out)
{
    extern __shared__ double shared[];
    int n = blockIdx.x, plane = size * size, radius = size / 20 > 1 ? size / 20 : 1;
    long long begin = (long long)n * channels * plane;
    drawn += (long long)n * (16 + 2 * channels), other += begin, x += begin;
    const float *start = drawn, *extent = drawn + 2, *order = drawn + 4, *factors = drawn + 8;
    const float flip = drawn[12], gray = drawn[13], sigma = drawn[14], solarize = drawn[15];
    const float *mean = drawn + 16, *std = mean + channels;

    float *tap = (float *)(shared + blockDim.x);
    int *first = (int *)(tap + radius + 1);
    Taps down = {first, (float *)(first + 2 * size), 0};
    triangles(&down, start[0], extent[0], side, size, bleed, 0, 1.0f / 255);
    Taps across = {first + size, down.weight + down.count * size, 0};
    triangles(&across, start[1], extent[1], side, size, bleed, flip != 0, 1);
    __syncthreads();
    resample(images + (long long)(n % images_count) * channels * side * side, channels, side, size, down, across, x);
    for (int s = 0; s < 4; s++) {
        int operation = (int)order[s];
        if (operation < 0) continue;
        float factor = factors[operation];
        if (operation == 0) brightness(x, plane, channels, factor);
        if (operation == 1) contrast(x, shared, plane, channels, factor);
        if (operation == 2) saturation(x, plane, factor);
        if (operation == 3) hue(x, plane, factor);
    }
    if (gray != 0) grayscale(x, plane, channels);
    if (sigma > 0) blur(x, other, tap, channels, size, sigma);
    for (int c = 0; c < channels; c++) {
        float shift = mean[c], scale = 1 / std[c];
        for (int i = threadIdx.x; i < plane; i += blockDim.x) {
            float value = x[c * plane + i];
            if (solarize != 0 && value >= (float)solarize_from) value = 1 - value;
            value = (value - shift) * scale;
            long long to = begin + (channels_last ? i * channels + c : c * plane + i);
            if (form == 0) ((float *)out)[to] = value;
            if (form == 1) ((unsigned short *)out)[to] = bfloat16(value);
            if (form == 2) ((unsigned short *)out)[to] = float16(value);
        }
    }
}
