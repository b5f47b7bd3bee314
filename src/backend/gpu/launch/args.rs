//! Arguments of kernels, and how they lie in memory.

use super::super::device::{Buffer, Place};
use crate::error::Result;

/// An argument of a kernel, in the order of its declaration.
#[derive(Debug, Clone, PartialEq)]
pub enum Arg {
    /// Pointer into device memory (8 bytes).
    Pointer(Place),
    /// Null pointer (8 bytes): an operand that is absent.
    Null,
    /// int (4 bytes).
    I32(i32),
    /// float (4 bytes).
    F32(f32),
    /// A struct by value, of these members.
    Struct(Vec<Arg>),
}

impl From<Place> for Arg {
    fn from(place: Place) -> Self {
        Arg::Pointer(place)
    }
}

impl From<Option<Place>> for Arg {
    fn from(place: Option<Place>) -> Self {
        place.map_or(Arg::Null, Arg::Pointer)
    }
}

impl From<Buffer> for Arg {
    fn from(buffer: Buffer) -> Self {
        Arg::Pointer(buffer.into())
    }
}

impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        // Sizes and strides of one image; what does not fit is refused (`lower::check_sizes`).
        Arg::I32(value as i32)
    }
}

impl From<bool> for Arg {
    fn from(value: bool) -> Self {
        Arg::I32(i32::from(value))
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Arg::F32(value)
    }
}

impl Arg {
    /// Alignment in C, in bytes.
    fn align(&self) -> usize {
        match self {
            Arg::Pointer(_) | Arg::Null => 8,
            Arg::I32(_) | Arg::F32(_) => 4,
            Arg::Struct(members) => members.iter().map(Arg::align).max().unwrap_or(1),
        }
    }

    /// Appends the bytes of a value as C has them in a struct, padding included.
    fn lay_out(
        &self,
        bytes: &mut Vec<u8>,
        address: &mut impl FnMut(Place) -> Result<u64>,
    ) -> Result<()> {
        let align = self.align();
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        match self {
            Arg::Pointer(place) => bytes.extend(address(*place)?.to_ne_bytes()),
            Arg::Null => bytes.extend(0u64.to_ne_bytes()),
            Arg::I32(value) => bytes.extend(value.to_ne_bytes()),
            Arg::F32(value) => bytes.extend(value.to_ne_bytes()),
            Arg::Struct(members) => {
                members.iter().try_for_each(|member| member.lay_out(bytes, address))?;
                bytes.resize(bytes.len().next_multiple_of(align), 0);
            }
        }
        Ok(())
    }

    /// The same argument with null pointers and zeros in it: one that is not there.
    pub fn absent(&self) -> Arg {
        match self {
            Arg::Pointer(_) | Arg::Null => Arg::Null,
            Arg::I32(_) => Arg::I32(0),
            Arg::F32(_) => Arg::F32(0.0),
            Arg::Struct(members) => Arg::Struct(members.iter().map(Arg::absent).collect()),
        }
    }
}

/// A letter per argument, as in the emulated kernels' signatures: p pointer, i int, f float, s struct.
pub fn kinds(args: &[Arg]) -> String {
    let kind = |arg: &Arg| match arg {
        Arg::Pointer(_) | Arg::Null => 'p',
        Arg::I32(_) => 'i',
        Arg::F32(_) => 'f',
        Arg::Struct(_) => 's',
    };
    args.iter().map(kind).collect()
}

/// Arguments as a driver wants to find them: each in memory of its own, aligned to 8 bytes, of which
/// the kernel reads as many bytes as its parameter has.
pub struct Cells(Vec<(usize, Vec<u64>)>);

impl Cells {
    /// `address` says where places are.
    ///
    /// # Errors
    /// Those of `address`.
    pub fn new(args: &[Arg], mut address: impl FnMut(Place) -> Result<u64>) -> Result<Self> {
        let mut cell = |arg: &Arg| {
            let mut bytes = Vec::new();
            arg.lay_out(&mut bytes, &mut address)?;
            let mut words = vec![0u64; bytes.len().div_ceil(8)];
            bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
            Ok((bytes.len(), words))
        };
        args.iter().map(&mut cell).collect::<Result<_>>().map(Cells)
    }

    /// Bytes of each argument.
    pub fn sizes(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|(bytes, _)| *bytes)
    }

    /// Where each argument is, for as long as these cells live.
    pub fn pointers(&mut self) -> Vec<*mut std::ffi::c_void> {
        self.0.iter_mut().map(|(_, words)| words.as_mut_ptr().cast()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    const PLACE: Place = Place { buffer: Buffer(3), byte_offset: 40 };

    #[test]
    fn arguments_are_packed_as_the_kernel_reads_them() {
        let args = [Arg::Pointer(PLACE), Arg::Null, Arg::I32(-2), Arg::F32(1.5)];
        let cells = Cells::new(&args, |place| {
            assert_eq!((place.buffer, place.byte_offset), (Buffer(3), 40));
            Ok(0x7f00_0000_1028)
        })
        .unwrap();
        assert_eq!(cells.sizes().collect::<Vec<_>>(), [8, 8, 4, 4]);
        assert_eq!((cells.0[0].1[0], cells.0[1].1[0]), (0x7f00_0000_1028, 0));
        let bytes: [&[u8]; 2] = [2, 3].map(|i: usize| bytemuck::cast_slice(&cells.0[i].1));
        assert_eq!(
            (&bytes[0][..4], &bytes[1][..4]),
            (&(-2i32).to_ne_bytes()[..], &1.5f32.to_ne_bytes()[..])
        );
    }

    #[test]
    fn structs_are_padded_as_in_c() {
        let pair = || Arg::Struct(vec![Arg::I32(1), Arg::Pointer(PLACE)]);
        let members = vec![Arg::I32(2), pair(), Arg::F32(0.0)];
        let cells = Cells::new(&[Arg::Struct(members)], |_| Ok(5)).unwrap();
        // int, 4 bytes of padding, { int, 4 bytes, pointer }, float, 4 bytes at the end.
        let low = |word: u64| u32::from_ne_bytes(word.to_ne_bytes()[..4].try_into().unwrap());
        let words = &cells.0[0].1;
        assert_eq!(cells.sizes().next(), Some(32));
        assert_eq!((low(words[0]), low(words[1]), words[2], words[3]), (2, 1, 5, 0));
        assert_eq!(pair().absent(), Arg::Struct(vec![Arg::I32(0), Arg::Null]));
    }

    #[test]
    fn a_bad_address_stops_the_launch() {
        let refuse = |_| Err(Error::Failed("outside".into()));
        assert!(Cells::new(&[Arg::Struct(vec![Arg::Pointer(PLACE)])], refuse).is_err());
    }
}
