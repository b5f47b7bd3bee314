//! Vector kernels over single planes: sums, affine maps, and the two passes of batch norm.
//! All slices that a function takes are of one length unless it says otherwise; another one panics,
//! since the shape rules of `ops` have spoken before.

use super::simd::{Isa, Kernel, Simd};

/// Work on the elements `at .. at + lanes`, independent of all others.
trait Elementwise {
    unsafe fn step<S: Simd>(&self, at: usize, lanes: usize);
}

struct ForEach<E>(E, usize);

impl<E: Elementwise> Kernel for ForEach<E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let whole = self.1 / S::LANES * S::LANES;
        let mut at = 0;
        while at < whole {
            unsafe { self.0.step::<S>(at, S::LANES) };
            at += S::LANES;
        }
        if at < self.1 {
            unsafe { self.0.step::<S>(at, self.1 - at) };
        }
    }
}

fn for_each<E: Elementwise>(isa: Isa, len: usize, work: E) {
    unsafe { isa.run(ForEach(work, len)) }
}

/// Two sums over a plane, in eight vectors that are added up in a fixed order.
trait Reduction {
    unsafe fn terms<S: Simd>(&self, at: usize, lanes: usize) -> (S, S);
}

struct Reduce<'a, R>(R, usize, &'a mut (f64, f64));

impl<R: Reduction> Kernel for Reduce<'_, R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        const WAYS: usize = 4;
        let Reduce(work, len, out) = self;
        unsafe {
            let mut sums = [(S::zero(), S::zero()); WAYS];
            let block = WAYS * S::LANES;
            let mut at = 0;
            while at + block <= len {
                for (i, (a, b)) in sums.iter_mut().enumerate() {
                    let (x, y) = work.terms::<S>(at + i * S::LANES, S::LANES);
                    *a = a.add(x);
                    *b = b.add(y);
                }
                at += block;
            }
            let mut i = 0;
            while at < len {
                let lanes = (len - at).min(S::LANES);
                let (x, y) = work.terms::<S>(at, lanes);
                sums[i].0 = sums[i].0.add(x);
                sums[i].1 = sums[i].1.add(y);
                at += lanes;
                i += 1;
            }
            for (a, b) in sums {
                out.0 += f64::from(a.sum());
                out.1 += f64::from(b.sum());
            }
        }
    }
}

fn reduce<R: Reduction>(isa: Isa, len: usize, work: R) -> (f64, f64) {
    let mut sums = (0.0, 0.0);
    unsafe { isa.run(Reduce(work, len, &mut sums)) }
    sums
}

/// Takes a row apart: `even[i] = x[2 i]` and, where wanted, `odd[i] = x[2 i + 1]`. `even` has
/// ceil(W / 2) elements, `odd` W / 2.
pub fn split_row(isa: Isa, x: &[f32], even: &mut [f32], odd: Option<&mut [f32]>) {
    struct Split<'a> {
        x: &'a [f32],
        even: &'a mut [f32],
        odd: Option<&'a mut [f32]>,
    }
    impl Kernel for Split<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            let pairs = self.x.len() / 2;
            let even = self.even.as_mut_ptr();
            let odd = self.odd.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr);
            let mut at = 0;
            while at < pairs && pairs >= S::LANES {
                // The last vector may do again what the one before it did.
                at = at.min(pairs - S::LANES);
                unsafe {
                    let p = self.x.as_ptr().add(2 * at);
                    let (first, second) = S::load(p).deinterleave(S::load(p.add(S::LANES)));
                    first.store(even.add(at));
                    if !odd.is_null() {
                        second.store(odd.add(at));
                    }
                }
                at += S::LANES;
            }
            for i in at..pairs {
                unsafe {
                    *even.add(i) = self.x[2 * i];
                    if !odd.is_null() {
                        *odd.add(i) = self.x[2 * i + 1];
                    }
                }
            }
            if self.x.len() % 2 == 1 {
                unsafe { *even.add(pairs) = self.x[2 * pairs] }
            }
        }
    }
    assert!(even.len() == x.len().div_ceil(2));
    assert!(odd.as_ref().is_none_or(|odd| odd.len() == x.len() / 2));
    unsafe { isa.run(Split { x, even, odd }) }
}

/// Sum of a plane.
pub fn sum(isa: Isa, x: &[f32]) -> f64 {
    struct Sum(*const f32);
    impl Reduction for Sum {
        #[inline(always)]
        unsafe fn terms<S: Simd>(&self, at: usize, lanes: usize) -> (S, S) {
            unsafe { (S::load_up_to(self.0.add(at), lanes), S::zero()) }
        }
    }
    reduce(isa, x.len(), Sum(x.as_ptr())).0
}

/// Sum of squares of x - mean.
pub fn sum_squared_diff(isa: Isa, x: &[f32], mean: f32) -> f64 {
    struct Squares(*const f32, f32);
    impl Reduction for Squares {
        #[inline(always)]
        unsafe fn terms<S: Simd>(&self, at: usize, lanes: usize) -> (S, S) {
            unsafe {
                let d: S = S::load_up_to(self.0.add(at), lanes).sub(S::splat(self.1));
                let square = d.mul(d);
                if lanes == S::LANES {
                    return (square, S::zero());
                }
                // Lanes behind the end hold mean^2: mask them through memory.
                let mut padded = [0.0f32; 16];
                square.store_first(padded.as_mut_ptr(), lanes);
                (S::load(padded.as_ptr()), S::zero())
            }
        }
    }
    reduce(isa, x.len(), Squares(x.as_ptr(), mean)).0
}

/// Dot product of two planes.
pub fn dot(isa: Isa, a: &[f32], b: &[f32]) -> f64 {
    struct Dot(*const f32, *const f32);
    impl Reduction for Dot {
        #[inline(always)]
        unsafe fn terms<S: Simd>(&self, at: usize, lanes: usize) -> (S, S) {
            unsafe {
                let a: S = S::load_up_to(self.0.add(at), lanes);
                (a.mul(S::load_up_to(self.1.add(at), lanes)), S::zero())
            }
        }
    }
    assert_eq!(a.len(), b.len());
    reduce(isa, a.len(), Dot(a.as_ptr(), b.as_ptr())).0
}

/// A gradient, passed where the forward output is positive (ReLU) or everywhere.
#[derive(Clone, Copy)]
pub struct Gated<'a> {
    /// Gradient behind the ReLU.
    pub grad: &'a [f32],
    /// Forward output of the ReLU, if there is one.
    pub gate: Option<&'a [f32]>,
}

impl Gated<'_> {
    fn pointers(&self) -> GatedPtr {
        if let Some(gate) = self.gate {
            assert_eq!(gate.len(), self.grad.len());
        }
        GatedPtr(self.grad.as_ptr(), self.gate.map_or(std::ptr::null(), <[f32]>::as_ptr))
    }
}

#[derive(Clone, Copy)]
struct GatedPtr(*const f32, *const f32);

impl GatedPtr {
    #[inline(always)]
    unsafe fn at<S: Simd>(self, at: usize, lanes: usize) -> S {
        unsafe {
            let g: S = S::load_up_to(self.0.add(at), lanes);
            if self.1.is_null() {
                g
            } else {
                g.where_positive(S::load_up_to(self.1.add(at), lanes))
            }
        }
    }
}

/// (sum of g, sum of g * (x - mean)) over a plane: the two reductions of batch norm's backward.
pub fn norm_backward_sums(isa: Isa, g: Gated, x: &[f32], mean: f32) -> (f64, f64) {
    struct Sums(GatedPtr, *const f32, f32);
    impl Reduction for Sums {
        #[inline(always)]
        unsafe fn terms<S: Simd>(&self, at: usize, lanes: usize) -> (S, S) {
            unsafe {
                let g: S = self.0.at(at, lanes);
                let centred = S::load_up_to(self.1.add(at), lanes).sub(S::splat(self.2));
                (g, g.mul(centred))
            }
        }
    }
    assert_eq!(g.grad.len(), x.len());
    reduce(isa, x.len(), Sums(g.pointers(), x.as_ptr(), mean))
}

/// Coefficients of batch norm's data gradient: dx = scale * (g - mean_g - (x - mean) * slope).
#[derive(Clone, Copy)]
pub struct NormBackward {
    /// Batch mean of x.
    pub mean: f32,
    /// weight / sqrt(var + eps).
    pub scale: f32,
    /// Mean of g over the batch.
    pub mean_g: f32,
    /// Mean of g * x_hat over the batch, times 1 / sqrt(var + eps).
    pub slope: f32,
}

/// Writes dx by [`NormBackward`], or adds it to what is there; g, x and dx are one plane each.
pub fn norm_backward(
    isa: Isa,
    g: Gated,
    x: &[f32],
    k: NormBackward,
    dx: &mut [f32],
    accumulate: bool,
) {
    struct Apply(GatedPtr, *const f32, NormBackward, *mut f32, bool);
    impl Elementwise for Apply {
        #[inline(always)]
        unsafe fn step<S: Simd>(&self, at: usize, lanes: usize) {
            unsafe {
                let k = &self.2;
                let g: S = self.0.at(at, lanes);
                let centred = S::load_up_to(self.1.add(at), lanes).sub(S::splat(k.mean));
                let inner = centred.mul_add(S::splat(-k.slope), g.sub(S::splat(k.mean_g)));
                let mut y = inner.mul(S::splat(k.scale));
                if self.4 {
                    y = y.add(S::load_up_to(self.3.add(at), lanes));
                }
                y.store_up_to(self.3.add(at), lanes);
            }
        }
    }
    assert!(g.grad.len() == x.len() && x.len() == dx.len());
    let work = Apply(g.pointers(), x.as_ptr(), k, dx.as_mut_ptr(), accumulate);
    for_each(isa, x.len(), work);
}

/// out = g, or out += g with `accumulate`, over a plane.
pub fn pass_gated(isa: Isa, g: Gated, out: &mut [f32], accumulate: bool) {
    struct Pass(GatedPtr, *mut f32, bool);
    impl Elementwise for Pass {
        #[inline(always)]
        unsafe fn step<S: Simd>(&self, at: usize, lanes: usize) {
            unsafe {
                let mut y: S = self.0.at(at, lanes);
                if self.2 {
                    y = y.add(S::load_up_to(self.1.add(at), lanes));
                }
                y.store_up_to(self.1.add(at), lanes);
            }
        }
    }
    assert_eq!(g.grad.len(), out.len());
    for_each(isa, out.len(), Pass(g.pointers(), out.as_mut_ptr(), accumulate));
}

/// y = relu?(x * scale + shift + residual).
pub fn affine(
    isa: Isa,
    x: &[f32],
    (scale, shift): (f32, f32),
    residual: Option<&[f32]>,
    relu: bool,
    y: &mut [f32],
) {
    struct Affine(*const f32, f32, f32, *const f32, bool, *mut f32);
    impl Elementwise for Affine {
        #[inline(always)]
        unsafe fn step<S: Simd>(&self, at: usize, lanes: usize) {
            unsafe {
                let x: S = S::load_up_to(self.0.add(at), lanes);
                let mut y = x.mul_add(S::splat(self.1), S::splat(self.2));
                if !self.3.is_null() {
                    y = y.add(S::load_up_to(self.3.add(at), lanes));
                }
                if self.4 {
                    y = S::zero().max(y);
                }
                y.store_up_to(self.5.add(at), lanes);
            }
        }
    }
    assert!(x.len() == y.len() && residual.is_none_or(|r| r.len() == x.len()));
    let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
    let work = Affine(x.as_ptr(), scale, shift, residual, relu, y.as_mut_ptr());
    for_each(isa, x.len(), work);
}

/// y = a + b.
pub fn add(isa: Isa, a: &[f32], b: &[f32], y: &mut [f32]) {
    affine(isa, a, (1.0, 0.0), Some(b), false, y);
}

/// y = a + frac * (b - a).
pub fn blend(isa: Isa, a: &[f32], b: &[f32], frac: f32, y: &mut [f32]) {
    struct Blend(*const f32, *const f32, f32, *mut f32);
    impl Elementwise for Blend {
        #[inline(always)]
        unsafe fn step<S: Simd>(&self, at: usize, lanes: usize) {
            unsafe {
                let a: S = S::load_up_to(self.0.add(at), lanes);
                let difference = S::load_up_to(self.1.add(at), lanes).sub(a);
                difference.mul_add(S::splat(self.2), a).store_up_to(self.3.add(at), lanes);
            }
        }
    }
    assert!(a.len() == y.len() && b.len() == y.len());
    for_each(isa, y.len(), Blend(a.as_ptr(), b.as_ptr(), frac, y.as_mut_ptr()));
}

/// y *= x.
pub fn multiply(isa: Isa, x: &[f32], y: &mut [f32]) {
    struct Multiply(*const f32, *mut f32);
    impl Elementwise for Multiply {
        #[inline(always)]
        unsafe fn step<S: Simd>(&self, at: usize, lanes: usize) {
            unsafe {
                let p = self.1.add(at);
                S::load_up_to(self.0.add(at), lanes)
                    .mul(S::load_up_to(p, lanes))
                    .store_up_to(p, lanes);
            }
        }
    }
    assert_eq!(x.len(), y.len());
    for_each(isa, x.len(), Multiply(x.as_ptr(), y.as_mut_ptr()));
}

/// y += scale * x.
pub fn add_scaled(isa: Isa, x: &[f32], scale: f32, y: &mut [f32]) {
    struct AddScaled(*const f32, f32, *mut f32);
    impl Elementwise for AddScaled {
        #[inline(always)]
        unsafe fn step<S: Simd>(&self, at: usize, lanes: usize) {
            unsafe {
                let p = self.2.add(at);
                let x: S = S::load_up_to(self.0.add(at), lanes);
                x.mul_add(S::splat(self.1), S::load_up_to(p, lanes)).store_up_to(p, lanes);
            }
        }
    }
    assert_eq!(x.len(), y.len());
    for_each(isa, x.len(), AddScaled(x.as_ptr(), scale, y.as_mut_ptr()));
}
