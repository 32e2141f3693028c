// A whole step of decoding one row of TNL in one kernel; decode_step_cuda.py compiles it for a model's dimensions.
//
// Each of PROGRAMS blocks keeps to a processor for the whole step. In a layer they wait for each other three times, by
// counters in memory: for queries and keys (only the blocks of a head), for the output projection, and for the gated
// linear unit. The last two are sums over all blocks, to which each adds its part.
//
// Every warp reads rows of weights in an order that it knows beforehand, so one lane asks for them far ahead, across
// all waiting, by bulk copies into a ring in shared memory: memory is read all the time. Rows of the output and the
// down projection are columns of their matrices, which are transposed for this.
//
// WIDTH d, HEADS x E = HE, INNER of the gated linear unit, LAYERS; WORDS of the vocabulary come as an argument.

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int PIECE = 1024;                   // weights in one copy
constexpr int PIECES = WIDTH / PIECE;         // copies to a row
constexpr int LANE = WIDTH / 32;              // elements of a row that a lane has
constexpr int HE = HEADS * E;
constexpr int COLUMNS = HE / PROGRAMS;        // of the heads' columns, in a block
constexpr int MINE = COLUMNS / WARPS;         // of these in a warp: w, w + 8, ..
constexpr int BLOCKS_OF_HEAD = E / COLUMNS;
constexpr int KEYS = E / 32;                  // rows of the state that a lane has
constexpr int SHARE = (INNER + PROGRAMS - 1) / PROGRAMS;  // units in a block, of which a warp has w, w + 8, ..
constexpr int FIELDS = 7;                     // of a layer in TABLE: qkvu, out, gate, up, down, state, theta
constexpr int LINE = 32;                      // counters in a line of memory
constexpr int COPY_BYTES = 2 * PIECE;
constexpr long long ROW_BYTES = 2 * WIDTH;

typedef unsigned int u32;
typedef unsigned long long u64;

struct Shared {
    unsigned char ring[WARPS][SLOTS][COPY_BYTES];
    float parts[WARPS][WIDTH];
    float x[WIDTH];
    float squares[WARPS];
    u64 arrived[WARPS][SLOTS];
    u64 table[(LAYERS + 1) * FIELDS];  // behind the layers: the head
};

__device__ __forceinline__ u32 address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

// Two weights from 32 bits.
__device__ __forceinline__ float2 widen(u32 pair) {
#if HALF
    float2 both;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(both.x), "=f"(both.y) : "r"(pair));
    return both;
#else
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#endif
}

__device__ __forceinline__ unsigned short narrow(float x) {
    unsigned short result;
#if HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(x));
#endif
    return result;
}

__device__ __forceinline__ float4 load_others(const float* pointer) {  // what other blocks wrote: not from this one's cache
    return __ldcg(reinterpret_cast<const float4*>(pointer));
}

__device__ __forceinline__ void add_to(float* sum, float4 x) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sum), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

// Tell that what this block has written is there.
__device__ __forceinline__ void arrive(int* counter) {
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Until a counter has reached a target; counters run over, their differences do not.
__device__ __forceinline__ void wait(int* counter, int target) {
    if (threadIdx.x == 0) {
        int seen;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        while (seen - target < 0);
    }
    __syncthreads();
}

// The rows of weights of a warp, in the order in which it needs them.
struct Rows {
    Shared& shared;
    const int warp, lane, program, units, words, each;
    int layer = 0, row = 0, piece = 0;     // that is asked for next
    int slot = 0, next_slot = 0;           // that is read next, and that is filled next
    u32 parity = 0;

    __device__ Rows(Shared& shared, int program, int units, int words, int each)
        : shared(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32), program(program), units(units), words(words), each(each) {}

    __device__ __forceinline__ u64 source() const {
        const u64* fields = shared.table + layer * FIELDS;
        const int first = program * COLUMNS + warp;
        if (layer == LAYERS) return fields[0] + (static_cast<u64>(program) * each + warp + WARPS * row) * ROW_BYTES;
        if (row < 4 * MINE) return fields[0] + static_cast<u64>((row / MINE) * HE + first + WARPS * (row % MINE)) * ROW_BYTES;
        if (row < 5 * MINE) return fields[1] + static_cast<u64>(first + WARPS * (row - 4 * MINE)) * ROW_BYTES;
        const int unit = (row - 5 * MINE) / 3, matrix = (row - 5 * MINE) % 3;
        return fields[2 + matrix] + static_cast<u64>(program * SHARE + warp + WARPS * unit) * ROW_BYTES;
    }

    // Ask for the next piece, into the slot that was read last.
    __device__ __forceinline__ void ask() {
        const int last = layer == LAYERS ? words : 5 * MINE + 3 * units;
        if (layer > LAYERS || (layer == LAYERS && words == 0)) return;
        if (lane == 0) {
            const u32 barrier = address(&shared.arrived[warp][next_slot]);
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(COPY_BYTES) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             address(shared.ring[warp][next_slot])),
                         "l"(source() + piece * COPY_BYTES), "r"(COPY_BYTES), "r"(barrier)
                         : "memory");
        }
        next_slot = next_slot + 1 == SLOTS ? 0 : next_slot + 1;
        if (++piece < PIECES) return;
        piece = 0;
        if (++row < last) return;
        row = 0;
        ++layer;
    }

    // Four times eight weights of the next piece: those at 256 i + 8 lane, i = 0..3.
    __device__ __forceinline__ void take(uint4 (&weights)[4]) {
        const u32 barrier = address(&shared.arrived[warp][slot]);
        u32 done;
        do asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
        while (!done);
        const uint4* source = reinterpret_cast<const uint4*>(shared.ring[warp][slot]) + lane;
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[i] = source[32 * i];
        if (++slot == SLOTS) slot = 0, parity ^= 1;
        __syncwarp();
        ask();
    }

    // This lane's part of a row times x.
    __device__ __forceinline__ float dot(const float (&x)[LANE]) {
        float sums[4] = {};
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            uint4 weights[4];
            take(weights);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 pairs[4] = {weights[i].x, weights[i].y, weights[i].z, weights[i].w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 w = widen(pairs[j]);
                    const float* of_x = x + 32 * p + 8 * i + 2 * j;
                    sums[j] = fmaf(w.x, of_x[0], sums[j]);
                    sums[j] = fmaf(w.y, of_x[1], sums[j]);
                }
            }
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    // sum += factor * row
    __device__ __forceinline__ void add(float factor, float (&sum)[LANE]) {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            uint4 weights[4];
            take(weights);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 pairs[4] = {weights[i].x, weights[i].y, weights[i].z, weights[i].w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 w = widen(pairs[j]);
                    float* of_sum = sum + 32 * p + 8 * i + 2 * j;
                    of_sum[0] = fmaf(w.x, factor, of_sum[0]);
                    of_sum[1] = fmaf(w.y, factor, of_sum[1]);
                }
            }
        }
    }
};

// A lane's elements of x, and 1 / (mean(x^2) + eps).
__device__ __forceinline__ float load_x(const Shared& shared, float (&x)[LANE], float eps) {
    const int lane = threadIdx.x % 32;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < LANE / 8; ++i) {
        const float4* source = reinterpret_cast<const float4*>(shared.x + 256 * i + 8 * lane);
        const float4 a = source[0], b = source[1];
        const float values[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            x[8 * i + j] = values[j];
            squares = fmaf(values[j], values[j], squares);
        }
    }
    return 1.0f / (warp_sum(squares) / WIDTH + eps);
}

// Add the warps' parts, and x where it is wanted, to a sum in memory.
__device__ __forceinline__ void add_parts(Shared& shared, const float (&sum)[LANE], float* total, bool with_x) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < LANE / 8; ++i) {
        float4* target = reinterpret_cast<float4*>(shared.parts[warp] + 256 * i + 8 * lane);
        target[0] = make_float4(sum[8 * i], sum[8 * i + 1], sum[8 * i + 2], sum[8 * i + 3]);
        target[1] = make_float4(sum[8 * i + 4], sum[8 * i + 5], sum[8 * i + 6], sum[8 * i + 7]);
    }
    __syncthreads();
    for (int at = 4 * threadIdx.x; at < WIDTH; at += 4 * THREADS) {
        float4 whole = make_float4(0, 0, 0, 0);
        if (with_x) whole = *reinterpret_cast<const float4*>(shared.x + at);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float4 part = *reinterpret_cast<const float4*>(shared.parts[w] + at);
            whole.x += part.x, whole.y += part.y, whole.z += part.z, whole.w += part.w;
        }
        add_to(total + at, whole);
    }
}

// STREAM, ATTENDED [2, d] and SQUARES [2] are sums, of one layer and of the next in turn: the residual stream after a
// layer, the output projection before its norm's factor, squares of its input. Each is cleared a layer before it is
// added to, when all blocks have read it.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(
    const long long* token, long long* position, const unsigned short* embedding, unsigned short* logits,
    const u64* table, const float* log_decay, float* stream, float* attended, float* squares, float* queries_keys,
    int* counters, float scale, float eps, int vocabulary) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, program = blockIdx.x;
    const int head = program / BLOCKS_OF_HEAD;
    const int first = program * COLUMNS + warp;  // column of all heads

    for (int i = thread; i < (LAYERS + 1) * FIELDS; i += THREADS) shared.table[i] = table[i];
    if (lane == 0) {
        for (int i = 0; i < SLOTS; ++i)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&shared.arrived[warp][i])) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    // Counters go on from launch to launch; how many there were, each block notes for itself.
    int* launches_here = counters + LINE + program;
    int everyone = 0, of_head = 0;
    if (thread == 0) {
        const int launches = *launches_here;
        *launches_here = launches + 1;
        everyone = launches * 2 * LAYERS * PROGRAMS;
        of_head = launches * LAYERS * BLOCKS_OF_HEAD;
    }
    int* head_counter = counters + LINE + PROGRAMS + head * LINE;
    __syncthreads();

    const int each = (vocabulary + PROGRAMS - 1) / PROGRAMS;
    const int units_here = max(0, min(SHARE, INNER - program * SHARE)), words_here = max(0, min(each, vocabulary - program * each));
    const int units = max(0, (units_here - warp + WARPS - 1) / WARPS), words = max(0, (words_here - warp + WARPS - 1) / WARPS);
    Rows rows(shared, program, units, words, each);
    for (int i = 0; i < SLOTS; ++i) rows.ask();

    const long long place = *position;
    const unsigned short* embedded = embedding + *token * WIDTH;
    for (int at = 2 * thread; at < WIDTH; at += 2 * THREADS) {
        const float2 pair = widen(*reinterpret_cast<const u32*>(embedded + at));
        shared.x[at] = pair.x * scale;
        shared.x[at + 1] = pair.y * scale;
    }
    __syncthreads();

    float x[LANE], sum[LANE];
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; ++layer) {
        const int now = layer % 2, other = 1 - now;
        const u64* fields = shared.table + layer * FIELDS;
        const float* theta = reinterpret_cast<const float*>(fields[6]);
        const float kept = DECAY ? expf(log_decay[layer * HEADS + head]) : 1.0f;
        float* state = reinterpret_cast<float*>(fields[5]) + static_cast<long long>(head) * E * E * (theta ? 2 : 1) + lane * E + first % E;

        // Queries, keys, values and gates of this warp's columns.
        const float rstd = sqrtf(load_x(shared, x, eps));
        if (program == PROGRAMS - 1) {
            for (int at = thread; at < WIDTH; at += THREADS) attended[other * WIDTH + at] = stream[other * WIDTH + at] = 0;
            if (thread == 0) squares[other] = 0;
        }
        float projected[4][MINE];
#pragma unroll
        for (int s = 0; s < 4; ++s)
#pragma unroll
            for (int k = 0; k < MINE; ++k) projected[s][k] = rows.dot(x);
#pragma unroll
        for (int s = 0; s < 4; ++s)
#pragma unroll
            for (int k = 0; k < MINE; ++k) {
                const float y = rstd * warp_sum(projected[s][k]);
                projected[s][k] = s < 2 ? y / (1.0f + expf(-y)) : y;
                if (s < 2 && lane == 0) queries_keys[s * HE + first + WARPS * k] = projected[s][k];
            }
        arrive(head_counter);
        float cosines[MINE][KEYS], sines[MINE][KEYS], cosine[KEYS], sine[KEYS];
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            cosine[j] = 1, sine[j] = 0;
            if (theta) {  // in float32 the angle would be far off at a position of a million
                const double turn = 6.283185307179586;
                const double angle = static_cast<double>(theta[head * E + lane + 32 * j]) * static_cast<double>(place);
                sincosf(static_cast<float>(angle - floor(angle / turn) * turn), &sine[j], &cosine[j]);
            }
#pragma unroll
            for (int k = 0; k < MINE; ++k) {
                cosines[k][j] = state[32 * j * E + WARPS * k];
                sines[k][j] = theta ? state[E * E + 32 * j * E + WARPS * k] : 0.0f;
            }
        }
        of_head += BLOCKS_OF_HEAD;
        wait(head_counter, of_head);

        // A step of attention, and its part of the output projection.
        float q[KEYS], key[KEYS], squares_here = 0;
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            q[j] = __ldcg(queries_keys + head * E + lane + 32 * j);
            key[j] = __ldcg(queries_keys + HE + head * E + lane + 32 * j);
        }
#pragma unroll
        for (int i = 0; i < LANE; ++i) sum[i] = 0;
#pragma unroll
        for (int k = 0; k < MINE; ++k) {
            float o = 0;
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                const float update = key[j] * projected[2][k];
                cosines[k][j] = fmaf(cosines[k][j], kept, update * cosine[j]);
                sines[k][j] = fmaf(sines[k][j], kept, update * sine[j]);
                o = fmaf(q[j] * cosine[j], cosines[k][j], o);
                o = fmaf(q[j] * sine[j], sines[k][j], o);
            }
            o = warp_sum(o);
            squares_here = fmaf(o, o, squares_here);
            rows.add(o * projected[3][k], sum);
        }
        if (lane == 0) shared.squares[warp] = squares_here;
        add_parts(shared, sum, attended + now * WIDTH, false);
        if (thread == 0) {
            float total = 0;
            for (int w = 0; w < WARPS; ++w) total += shared.squares[w];
            atomicAdd(squares + now, total);
        }
        arrive(counters);
#pragma unroll
        for (int k = 0; k < MINE; ++k)  // nobody waits for these
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                state[32 * j * E + WARPS * k] = cosines[k][j];
                if (theta) state[E * E + 32 * j * E + WARPS * k] = sines[k][j];
            }
        everyone += PROGRAMS;
        wait(counters, everyone);
        const float factor = rsqrtf(__ldcg(squares + now) / HE + eps);
        for (int at = 4 * thread; at < WIDTH; at += 4 * THREADS) {
            const float4 more = load_others(attended + now * WIDTH + at);
            float4& old = *reinterpret_cast<float4*>(shared.x + at);
            old.x += factor * more.x, old.y += factor * more.y, old.z += factor * more.z, old.w += factor * more.w;
        }
        __syncthreads();

        // The gated linear unit.
        const float square = load_x(shared, x, eps);
#pragma unroll
        for (int i = 0; i < LANE; ++i) sum[i] = 0;
#pragma unroll 1
        for (int unit = 0; unit < units; ++unit) {
            float gate = rows.dot(x), up = rows.dot(x);
#pragma unroll
            for (int lanes = 16; lanes > 0; lanes /= 2) {
                gate += __shfl_xor_sync(0xffffffffu, gate, lanes);
                up += __shfl_xor_sync(0xffffffffu, up, lanes);
            }
            rows.add(square * gate * up, sum);
        }
        add_parts(shared, sum, stream + other * WIDTH, program == 0);
        arrive(counters);
        everyone += PROGRAMS;
        wait(counters, everyone);
        for (int at = 4 * thread; at < WIDTH; at += 4 * THREADS)
            *reinterpret_cast<float4*>(shared.x + at) = load_others(stream + other * WIDTH + at);
        __syncthreads();
    }

    if (program == PROGRAMS - 1) {
        for (int at = thread; at < WIDTH; at += THREADS) attended[at] = 0;
        if (thread == 0) squares[0] = 0, *position = place + 1;
    }
    const float rstd = sqrtf(load_x(shared, x, eps));
#pragma unroll 1
    for (int word = 0; word < words; ++word) {
        const float y = warp_sum(rows.dot(x));
        if (lane == 0) logits[program * each + warp + WARPS * word] = narrow(rstd * y);
    }
}
