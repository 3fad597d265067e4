// The k largest numbers of each row, largest first and equal ones in the order of their columns.
//
// Each row is read once for the maxima of groups of its columns. The k-th largest of these is a bound that k numbers
// reach, and few others do: only groups that reach it are looked at again.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// Larger for a larger number, and of equal numbers for the smaller column: so no two keys are equal.
static inline uint64_t key(float x, uint32_t column)
{
    uint32_t bits;
    x += 0.0f; // -0 becomes 0
    memcpy(&bits, &x, sizeof bits);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~column;
}

static inline float number(uint64_t key)
{
    uint32_t bits = key >> 32;
    float x;
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Bring the k largest of n different keys to the front; the last of them is the smallest.
static void select_largest(uint64_t *keys, int64_t n, int64_t k)
{
    int64_t low = 0, high = n - 1, at = k - 1;
    while (low < high) {
        uint64_t a = keys[low], b = keys[low + (high - low) / 2], c = keys[high], least = a < b ? a : b;
        uint64_t most = a < b ? b : a, pivot = c > most ? most : c < least ? least : c; // the median of three
        int64_t left = low, right = high;
        while (left <= right) {
            while (keys[left] > pivot) left++;
            while (keys[right] < pivot) right--;
            if (left <= right) {
                uint64_t moved = keys[left];
                keys[left++] = keys[right], keys[right--] = moved;
            }
        }
        if (at <= right) high = right;
        else if (at >= left) low = left;
        else break;
    }
}

static int descending(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return (a < b) - (a > b);
}

// Rows `first` to `last` of x [rows, columns] into values and index [rows, k]. `groups`, at least k and at most the
// columns, is how many maxima are taken. Returns 0; 1 if memory is missing; 2 if a row holds what is no number.
int largest(const float *x, int64_t first, int64_t last, int64_t columns, int64_t groups, int64_t k, float *values,
            int64_t *index)
{
    float *restrict maxima = malloc(groups * sizeof *maxima);
    uint64_t *keys = malloc(columns * sizeof *keys);
    int64_t size = columns / groups, dealt = size * groups;
    int failed = !maxima || !keys;
    for (int64_t row = first; row < last && !failed; row++) {
        const float *restrict from = x + row * columns;
        int64_t count = 0;
        int broken = 0;
        for (int64_t column = 0; column < columns; column++) broken |= from[column] != from[column];
        if (broken) {
            failed = 2;
            break;
        }
        for (int64_t g = 0; g < groups; g++) maxima[g] = -INFINITY;
        // Neighbouring columns are in different groups: whole vectors are compared, and a row whose large numbers are
        // side by side, as in a bank sorted by class, spreads them over all groups.
        for (int64_t start = 0; start < dealt; start += groups)
            for (int64_t g = 0; g < groups; g++) maxima[g] = from[start + g] > maxima[g] ? from[start + g] : maxima[g];
        for (int64_t g = 0; g < groups; g++) keys[g] = key(maxima[g], (uint32_t)g);
        select_largest(keys, groups, k);
        float bound = number(keys[k - 1]);
        for (int64_t g = 0; g < groups; g++)
            if (maxima[g] >= bound)
                for (int64_t column = g; column < dealt; column += groups)
                    if (from[column] >= bound) keys[count++] = key(from[column], (uint32_t)column);
        for (int64_t column = dealt; column < columns; column++)
            if (from[column] >= bound) keys[count++] = key(from[column], (uint32_t)column);
        select_largest(keys, count, k);
        qsort(keys, k, sizeof *keys, descending);
        for (int64_t place = 0; place < k; place++) {
            values[row * k + place] = number(keys[place]);
            index[row * k + place] = (uint32_t)~(uint32_t)keys[place];
        }
    }
    free(maxima);
    free(keys);
    return failed;
}
