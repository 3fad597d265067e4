// kernel.cu on a CPU: what it needs of CUDA, with a thread of the machine for each thread of a block. -DKERNEL names it.
//
// In turns a thread runs until its barrier, or its end, before the next one begins. So where a barrier is missing, one of
// two orders of the threads reads what is not yet written, or no longer there, each time and not by chance.

#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(threads)

struct Three { unsigned x; };
static thread_local Three threadIdx, blockIdx;
static Three blockDim;
double shared[48 * 1024 / sizeof(double)];

static int order; // 1: in turns from the first thread to the last, -1: from the last to the first, 0: all at once
static std::mutex mutex;
static std::condition_variable moved;
static unsigned turn;
static std::vector<int> barriers, ended; // of each thread: how many it met, and whether it is through
static pthread_barrier_t barrier;

static void take_turn()
{
    if (!order) return;
    std::unique_lock<std::mutex> lock(mutex);
    moved.wait(lock, [] { return turn == threadIdx.x; });
}

static void pass_turn()
{
    if (!order) return;
    std::unique_lock<std::mutex> lock(mutex);
    for (unsigned tries = 0; tries == 0 || (tries < blockDim.x && ended[turn]); tries++)
        turn = (turn + blockDim.x + order) % blockDim.x;
    moved.notify_all();
}

static void __syncthreads()
{
    barriers[threadIdx.x]++;
    pass_turn(), take_turn();
    if (!order) pthread_barrier_wait(&barrier);
}

#include KERNEL

// 0; 1 when the threads of a block did not meet the same barriers, 2 when they wrote behind their shared memory.
extern "C" int launch(int blocks, int threads, int in_order, int shared_bytes, const unsigned char *images,
                      const float *drawn, int images_count, int channels, int side, int size, int bleed,
                      double solarize_from, int form, int channels_last, float *other, float *x, void *out)
{
    blockDim.x = threads, order = in_order;
    pthread_barrier_init(&barrier, nullptr, threads);
    int bad = 0;
    for (int n = 0; n < blocks && !bad; n++) {
        memset(shared, 0xff, sizeof shared); // nan
        barriers.assign(threads, 0), ended.assign(threads, 0), turn = order < 0 ? threads - 1 : 0;
        std::vector<std::thread> block;
        for (int t = 0; t < threads; t++)
            block.emplace_back([=] {
                threadIdx.x = t, blockIdx.x = n;
                take_turn();
                render(images, drawn, images_count, channels, side, size, bleed, solarize_from, form, channels_last,
                       other, x, out);
                ended[t] = 1;
                pass_turn();
            });
        for (auto &one : block) one.join();
        for (int t = 1; t < threads; t++) bad |= barriers[t] != barriers[0];
        for (int i = shared_bytes; i < (int)sizeof shared; i++)
            if (((unsigned char *)shared)[i] != 0xff) bad = 2;
    }
    pthread_barrier_destroy(&barrier);
    return bad;
}
