//! Views of planned tensors in the CPU arena: planes of H * W dense elements at fixed strides.

use std::marker::PhantomData;
use std::ops::Range;

use crate::graph::{Shape, Tensor};

/// A read-only tensor, N x C planes of H x W.
#[derive(Clone, Copy)]
pub struct View<'a> {
    base: *const f32,
    shape: Shape,
    batch_stride: usize,
    plane_stride: usize,
    memory: PhantomData<&'a [f32]>,
}

/// A tensor that an operator writes. Planes are handed out through a shared reference so that
/// threads can write different ones; see [`ViewMut::plane_mut`].
#[derive(Clone, Copy)]
pub struct ViewMut<'a> {
    base: *mut f32,
    shape: Shape,
    batch_stride: usize,
    plane_stride: usize,
    memory: PhantomData<&'a mut [f32]>,
}

// Views are plain references to memory; who writes which plane is up to the operators.
unsafe impl Send for View<'_> {}
unsafe impl Sync for View<'_> {}
unsafe impl Send for ViewMut<'_> {}
unsafe impl Sync for ViewMut<'_> {}

impl<'a> View<'a> {
    /// A planned tensor inside `arena`.
    ///
    /// # Safety
    /// `arena` points to the whole arena of the plan that placed `tensor`; nothing writes the
    /// tensor while the view is in use.
    pub unsafe fn of(arena: *const f32, tensor: &Tensor) -> Self {
        View {
            base: unsafe { arena.add(tensor.offset) },
            shape: tensor.shape,
            batch_stride: tensor.batch_stride,
            plane_stride: tensor.plane_stride,
            memory: PhantomData,
        }
    }

    /// A dense NCHW array.
    pub fn dense(data: &'a [f32], shape: Shape) -> Self {
        assert_eq!(data.len(), shape.len(), "dense view of {shape}");
        View {
            base: data.as_ptr(),
            shape,
            batch_stride: shape.c * shape.plane(),
            plane_stride: shape.plane(),
            memory: PhantomData,
        }
    }

    /// N x C x H x W.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Elements from one channel to the next.
    pub fn plane_stride(&self) -> usize {
        self.plane_stride
    }

    /// Plane (n, c), H * W elements, row-major.
    pub fn plane(&self, n: usize, c: usize) -> &'a [f32] {
        assert!(n < self.shape.n && c < self.shape.c);
        let start = n * self.batch_stride + c * self.plane_stride;
        unsafe { std::slice::from_raw_parts(self.base.add(start), self.shape.plane()) }
    }

    /// First element of image n; its planes follow at [`View::plane_stride`].
    pub fn image(&self, n: usize) -> *const f32 {
        assert!(n < self.shape.n);
        unsafe { self.base.add(n * self.batch_stride) }
    }
}

impl<'a> ViewMut<'a> {
    /// A planned tensor inside `arena`.
    ///
    /// # Safety
    /// As [`View::of`], and nothing else reads or writes the tensor while the view is in use,
    /// but for views of the same tensor handed to the same operator (in-place execution).
    pub unsafe fn of(arena: *mut f32, tensor: &Tensor) -> Self {
        ViewMut {
            base: unsafe { arena.add(tensor.offset) },
            shape: tensor.shape,
            batch_stride: tensor.batch_stride,
            plane_stride: tensor.plane_stride,
            memory: PhantomData,
        }
    }

    /// A dense NCHW array.
    pub fn dense(data: &'a mut [f32], shape: Shape) -> Self {
        assert_eq!(data.len(), shape.len(), "dense view of {shape}");
        ViewMut {
            base: data.as_mut_ptr(),
            shape,
            batch_stride: shape.c * shape.plane(),
            plane_stride: shape.plane(),
            memory: PhantomData,
        }
    }

    /// N x C x H x W.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Elements from one channel to the next.
    pub fn plane_stride(&self) -> usize {
        self.plane_stride
    }

    /// Plane (n, c) to write.
    ///
    /// # Safety
    /// No other live slice may cover this plane: an operator splits its work so that every
    /// plane (or part of one) belongs to one task.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn plane_mut(&self, n: usize, c: usize) -> &'a mut [f32] {
        assert!(n < self.shape.n && c < self.shape.c);
        let start = n * self.batch_stride + c * self.plane_stride;
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), self.shape.plane()) }
    }

    /// Pixels `range` of plane (n, c) to write, for work that is split inside planes.
    ///
    /// # Safety
    /// As [`ViewMut::plane_mut`], for these pixels.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn pixels_mut(&self, n: usize, c: usize, range: Range<usize>) -> &'a mut [f32] {
        assert!(n < self.shape.n && c < self.shape.c && range.end <= self.shape.plane());
        let start = n * self.batch_stride + c * self.plane_stride + range.start;
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), range.len()) }
    }

    /// First element of image n.
    pub fn image(&self, n: usize) -> *mut f32 {
        assert!(n < self.shape.n);
        unsafe { self.base.add(n * self.batch_stride) }
    }

    /// The same tensor to read.
    pub fn as_view(&self) -> View<'a> {
        View {
            base: self.base,
            shape: self.shape,
            batch_stride: self.batch_stride,
            plane_stride: self.plane_stride,
            memory: PhantomData,
        }
    }
}
