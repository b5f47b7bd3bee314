//! Vector instructions behind one trait: AVX-512, AVX2 with FMA, and a portable fallback.
//!
//! A kernel is a struct that implements [`Kernel`], written once against [`Simd`]; [`Isa::run`]
//! compiles it for each instruction set and picks one at run time.

/// Instruction set of the vector kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// 16 lanes.
    Avx512,
    /// 8 lanes with fused multiply-add.
    Avx2,
    /// 8 lanes that the compiler maps to whatever the target has.
    Portable,
}

/// Work that is compiled once per instruction set.
///
/// The entry points are methods of this trait, not functions of [`Isa`]: the compiler puts a
/// method's code beside the type it is for, so that the kernels of different files compile in
/// parallel instead of piling up in this one.
pub trait Kernel: Sized {
    /// Does the work with the vectors of `S`.
    ///
    /// # Safety
    /// The processor must support `S`; pointers inside the kernel must be valid as documented
    /// there. Implementations are `#[inline(always)]` so that they take on the caller's features.
    unsafe fn run<S: Simd>(self);

    /// [`Kernel::run`] with 16 lanes.
    ///
    /// # Safety
    /// As [`Kernel::run`].
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn run_avx512(self) {
        unsafe { self.run::<x86::F32x16>() }
    }

    /// [`Kernel::run`] with 8 lanes and fused multiply-add.
    ///
    /// # Safety
    /// As [`Kernel::run`].
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(self) {
        unsafe { self.run::<x86::F32x8>() }
    }

    /// [`Kernel::run`] in plain Rust.
    ///
    /// # Safety
    /// As [`Kernel::run`].
    #[inline(never)]
    unsafe fn run_portable(self) {
        unsafe { self.run::<Portable>() }
    }
}

impl Isa {
    /// The best set this processor has. `FPENET_ISA` (avx512, avx2, portable) lowers it.
    pub fn detect() -> Isa {
        let wanted = std::env::var("FPENET_ISA").unwrap_or_default();
        Isa::available()
            .into_iter()
            .find(|isa| wanted.is_empty() || isa.name() == wanted)
            .unwrap_or(Isa::Portable)
    }

    /// All sets this processor has, best first.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                found.push(Isa::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(Isa::Avx2);
            }
        }
        found.push(Isa::Portable);
        found
    }

    /// Name as in `FPENET_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        }
    }

    /// Runs a kernel with this instruction set.
    ///
    /// # Safety
    /// See [`Kernel::run`]; `self` must be one of [`Isa::available`].
    pub unsafe fn run<K: Kernel>(self, kernel: K) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { kernel.run_avx512() },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { kernel.run_avx2() },
            _ => unsafe { kernel.run_portable() },
        }
    }
}

/// A vector of f32 lanes.
///
/// # Safety
/// All functions need a processor with the instruction set; loads and stores need `LANES`
/// readable or writable elements, without alignment.
#[allow(clippy::missing_safety_doc)] // one contract for all, above
pub trait Simd: Copy {
    /// Number of lanes.
    const LANES: usize;
    /// All lanes from memory.
    unsafe fn load(p: *const f32) -> Self;
    /// All lanes to memory.
    unsafe fn store(self, p: *mut f32);
    /// The same value in all lanes.
    unsafe fn splat(x: f32) -> Self;
    /// self * b + c.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Lane-wise sum.
    unsafe fn add(self, b: Self) -> Self;
    /// Lane-wise difference.
    unsafe fn sub(self, b: Self) -> Self;
    /// Lane-wise product.
    unsafe fn mul(self, b: Self) -> Self;
    /// Lane-wise maximum; b where either is NaN, so that `zero().max(x)` is a ReLU that keeps NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// self where gate > 0, else 0.
    unsafe fn where_positive(self, gate: Self) -> Self;
    /// Sum of all lanes, in a fixed order.
    unsafe fn sum(self) -> f32;
    /// The lanes of self and b in turns: a0 b0 a1 b1 ..., in two vectors.
    unsafe fn interleave(self, b: Self) -> (Self, Self);
    /// The even and the odd elements of self followed by b: [`Simd::interleave`] undone.
    unsafe fn deinterleave(self, b: Self) -> (Self, Self);
    /// Asks for the cache line at `p`, which may be any address.
    #[inline(always)]
    unsafe fn prefetch(p: *const f32) {
        let _ = p;
    }
    /// Asks for the cache line at `p`, which may be any address, to be written soon.
    #[inline(always)]
    unsafe fn prefetch_write(p: *mut f32) {
        let _ = p;
    }
    /// The first `n` lanes from memory, a whole vector where that is all.
    #[inline(always)]
    unsafe fn load_up_to(p: *const f32, n: usize) -> Self {
        unsafe { if n == Self::LANES { Self::load(p) } else { Self::load_first(p, n) } }
    }
    /// The first `n` lanes to memory.
    #[inline(always)]
    unsafe fn store_up_to(self, p: *mut f32, n: usize) {
        unsafe { if n == Self::LANES { self.store(p) } else { self.store_first(p, n) } }
    }
    /// All zeros.
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self::splat(0.0) }
    }
    /// The first `n` lanes from memory, zeros behind them.
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        unsafe {
            let mut lanes = [0.0f32; 16];
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            Self::load(lanes.as_ptr())
        }
    }
    /// The first `n` lanes to memory.
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        unsafe {
            let mut lanes = [0.0f32; 16];
            self.store(lanes.as_mut_ptr());
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
}

/// Eight lanes in plain Rust.
#[derive(Clone, Copy)]
pub struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Portable(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Simd for Portable {
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Portable(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { p.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; 8])
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // Not f32::mul_add: without an FMA instruction that is a library call per lane.
        Portable(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn where_positive(self, gate: Self) -> Self {
        self.zip(gate, |x, g| if g > 0.0 { x } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let v = self.0;
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
    #[inline(always)]
    unsafe fn interleave(self, b: Self) -> (Self, Self) {
        let at = |i: usize| if i.is_multiple_of(2) { self.0[i / 2] } else { b.0[i / 2] };
        (Portable(std::array::from_fn(at)), Portable(std::array::from_fn(|i| at(i + 8))))
    }
    #[inline(always)]
    unsafe fn deinterleave(self, b: Self) -> (Self, Self) {
        let at = |i: usize| if i < 8 { self.0[i] } else { b.0[i - 8] };
        let half = |odd: usize| Portable(std::array::from_fn(|i| at(2 * i + odd)));
        (half(0), half(1))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    /// PREFETCHW, for which there is no intrinsic that every build of AVX2 or AVX-512 honours. The
    /// processors that have either set have it, or take it for a no-op.
    #[inline(always)]
    unsafe fn prefetch_to_own(p: *mut f32) {
        use std::arch::asm;
        unsafe { asm!("prefetchw [{}]", in(reg) p, options(nostack, preserves_flags)) }
    }

    #[derive(Clone, Copy)]
    pub struct F32x8(__m256);

    impl Simd for F32x8 {
        const LANES: usize = 8;
        #[inline(always)]
        unsafe fn prefetch(p: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn prefetch_write(p: *mut f32) {
            unsafe { prefetch_to_own(p) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            F32x8(unsafe { _mm256_loadu_ps(p) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm256_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            F32x8(unsafe { _mm256_set1_ps(x) })
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            F32x8(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            F32x8(unsafe { _mm256_add_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            F32x8(unsafe { _mm256_sub_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            F32x8(unsafe { _mm256_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            F32x8(unsafe { _mm256_max_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn where_positive(self, gate: Self) -> Self {
            unsafe {
                let mask = _mm256_cmp_ps::<_CMP_GT_OQ>(gate.0, _mm256_setzero_ps());
                F32x8(_mm256_and_ps(self.0, mask))
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let v =
                    _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
            }
        }
        #[inline(always)]
        unsafe fn interleave(self, b: Self) -> (Self, Self) {
            unsafe {
                let low = _mm256_unpacklo_ps(self.0, b.0);
                let high = _mm256_unpackhi_ps(self.0, b.0);
                let first = _mm256_permute2f128_ps::<0x20>(low, high);
                (F32x8(first), F32x8(_mm256_permute2f128_ps::<0x31>(low, high)))
            }
        }
        #[inline(always)]
        unsafe fn deinterleave(self, b: Self) -> (Self, Self) {
            unsafe {
                let low = _mm256_permute2f128_ps::<0x20>(self.0, b.0);
                let high = _mm256_permute2f128_ps::<0x31>(self.0, b.0);
                let even = _mm256_shuffle_ps::<0b10_00_10_00>(low, high);
                (F32x8(even), F32x8(_mm256_shuffle_ps::<0b11_01_11_01>(low, high)))
            }
        }
    }

    /// A mask of the first n of 16 lanes.
    #[inline(always)]
    fn first_lanes(n: usize) -> __mmask16 {
        ((1u32 << n) - 1) as __mmask16
    }

    #[derive(Clone, Copy)]
    pub struct F32x16(__m512);

    impl Simd for F32x16 {
        const LANES: usize = 16;
        #[inline(always)]
        unsafe fn prefetch(p: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn prefetch_write(p: *mut f32) {
            unsafe { prefetch_to_own(p) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            F32x16(unsafe { _mm512_loadu_ps(p) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm512_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        unsafe fn load_first(p: *const f32, n: usize) -> Self {
            F32x16(unsafe { _mm512_maskz_loadu_ps(first_lanes(n), p) })
        }
        #[inline(always)]
        unsafe fn store_first(self, p: *mut f32, n: usize) {
            unsafe { _mm512_mask_storeu_ps(p, first_lanes(n), self.0) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            F32x16(unsafe { _mm512_set1_ps(x) })
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            F32x16(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            F32x16(unsafe { _mm512_add_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            F32x16(unsafe { _mm512_sub_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            F32x16(unsafe { _mm512_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            F32x16(unsafe { _mm512_max_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn where_positive(self, gate: Self) -> Self {
            unsafe {
                let mask = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(gate.0, _mm512_setzero_ps());
                F32x16(_mm512_maskz_mov_ps(mask, self.0))
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self.0) }
        }
        #[inline(always)]
        unsafe fn interleave(self, b: Self) -> (Self, Self) {
            unsafe {
                let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
                let first = _mm512_permutex2var_ps(self.0, low, b.0);
                (F32x16(first), F32x16(_mm512_permutex2var_ps(self.0, high, b.0)))
            }
        }
        #[inline(always)]
        unsafe fn deinterleave(self, b: Self) -> (Self, Self) {
            unsafe {
                let even =
                    _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
                let first = _mm512_permutex2var_ps(self.0, even, b.0);
                (F32x16(first), F32x16(_mm512_permutex2var_ps(self.0, odd, b.0)))
            }
        }
    }
}
