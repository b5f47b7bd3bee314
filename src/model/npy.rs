//! NumPy arrays (`.npy`) of f32 and u8, in and out.

use std::io::{self, Write};
use std::path::Path;

use half::f16;
use npyz::{DType, Deserialize, NpyFile, Order, WriterBuilder};

use super::tensors::dimensions;
use crate::error::{Error, Result};
use crate::files;

/// Largest file that is read.
const MAX_FILE: u64 = 1 << 33;
const NPY: &str = "a NumPy .npy file";
/// Longest header that is parsed; NumPy's own limit is 10000 too.
const MAX_HEADER: usize = 10_000;
/// Deepest nesting of brackets that the header's parser is given: it tries each level up to three
/// times. NumPy writes 2, and 6 for records in records.
const MAX_NESTING: usize = 6;
/// Digits of all dimensions together: a product of numbers with 19 digits in all fits into u64.
const MAX_SHAPE_DIGITS: usize = 19;

/// Reads an f32 array of either byte order and either memory order: shape and values in C order.
///
/// # Errors
/// [`Error::Io`] where it cannot be read, [`Error::Format`] where it is no array of f32 or its
/// data does not have the length that its shape asks for.
pub fn read_f32(path: &Path) -> Result<(Vec<usize>, Vec<f32>)> {
    read(path, "f32", "float32", &["<f4", ">f4"])
}

/// [`read_f32`] for a file in memory; `path` names it in messages.
///
/// # Errors
/// [`Error::Format`] as for [`read_f32`].
pub fn f32_from_bytes(bytes: &[u8], path: &Path) -> Result<(Vec<usize>, Vec<f32>)> {
    parse(bytes, path, "f32", "float32", &["<f4", ">f4"])
}

/// Reads a u8 array: shape and values in C order.
///
/// # Errors
/// As [`read_f32`].
pub fn read_u8(path: &Path) -> Result<(Vec<usize>, Vec<u8>)> {
    read(path, "u8", "uint8", &["|u1", "<u1", ">u1"])
}

/// Parses an array of f16, f32 or f64 in memory: shape, values in C order as f32, and what they
/// were stored as. `path` names it in messages.
///
/// # Errors
/// [`Error::Format`] where it is no array of one of these types or its data does not have the
/// length that its shape asks for.
pub fn parse_floats(bytes: &[u8], path: &Path) -> Result<(Vec<usize>, Vec<f32>, &'static str)> {
    match open(bytes, path)?.0.dtype() {
        DType::Plain(found) if found.to_string().ends_with("f2") => {
            let (shape, values) = parse::<f16>(bytes, path, "f16", "float16", &["<f2", ">f2"])?;
            return Ok((shape, values.into_iter().map(f16::to_f32).collect(), "f16"));
        }
        DType::Plain(found) if found.to_string().ends_with("f8") => {
            let (shape, values) = parse::<f64>(bytes, path, "f64", "float64", &["<f8", ">f8"])?;
            return Ok((shape, values.into_iter().map(|v| v as f32).collect(), "f64"));
        }
        _ => {}
    }
    let (shape, values) = parse(bytes, path, "f32", "float32", &["<f4", ">f4"])?;
    Ok((shape, values, "f32"))
}

/// Writes an f32 array in C order, as a whole or not at all.
///
/// # Errors
/// [`Error::Failed`] where `shape` does not have `data.len()` elements, [`Error::Io`] where it
/// cannot be written.
pub fn write_f32(path: &Path, shape: &[usize], data: &[f32]) -> Result<()> {
    if shape.iter().product::<usize>() != data.len() {
        return Err(Error::Failed(format!(
            "{}: expected values for shape {}, found {}",
            path.display(),
            dimensions(shape),
            data.len()
        )));
    }
    files::write_atomic(path, |w| write_f32_to(w, shape, data))
}

/// [`write_f32`] into a pipe; `shape` must have `data.len()` elements.
///
/// # Errors
/// Those of `w`, and where the number of elements is another.
pub fn write_f32_to(w: &mut dyn Write, shape: &[usize], data: &[f32]) -> io::Result<()> {
    let shape: Vec<u64> = shape.iter().map(|&d| d as u64).collect();
    let mut writer =
        npyz::WriteOptions::new().default_dtype().shape(&shape).writer(w).begin_nd()?;
    writer.extend(data.iter().copied())?;
    writer.finish()
}

/// Refuses NaN and infinities in an array that came from `path`.
///
/// # Errors
/// [`Error::Format`] with the first such element.
pub fn check_finite(path: &Path, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => {
            Err(Error::format(path, "finite values", format!("{} at element {i}", values[i])))
        }
        None => Ok(()),
    }
}

fn read<T: Deserialize + Copy>(
    path: &Path,
    kind: &str,
    numpy: &str,
    types: &[&str],
) -> Result<(Vec<usize>, Vec<T>)> {
    parse(&files::read_limited(path, MAX_FILE)?, path, kind, numpy, types)
}

fn parse<T: Deserialize + Copy>(
    bytes: &[u8],
    path: &Path,
    kind: &str,
    numpy: &str,
    types: &[&str],
) -> Result<(Vec<usize>, Vec<T>)> {
    let wrong = |expected: &str, found: String| Error::format(path, expected, found);
    let (file, data) = open(bytes, path)?;

    let dtype = file.dtype();
    let accepted = match &dtype {
        DType::Plain(found) => types.contains(&found.to_string().as_str()),
        _ => false,
    };
    if !accepted {
        let expected = format!("an array of {kind} (in NumPy: x.astype(\"{numpy}\"))");
        return Err(wrong(&expected, format!("dtype {}", one_line(&dtype.descr()))));
    }
    let shape: Vec<usize> = file.shape().iter().map(|&d| d as usize).collect();
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let length = elements.and_then(|n| n.checked_mul(size_of::<T>()));
    if length != Some(data.len()) {
        let expected = match length {
            Some(length) => format!("{length} bytes of data for shape {}", dimensions(&shape)),
            None => "a shape that fits into memory".to_string(),
        };
        return Err(wrong(&expected, format!("{} bytes", data.len())));
    }
    let order = file.order();
    let values = file.into_vec().map_err(|e| wrong(NPY, one_line(&e)))?;
    let values = match order {
        Order::C => values,
        Order::Fortran => c_order(&shape, &values),
    };
    Ok((shape, values))
}

/// The file with its header parsed, and the data behind that.
fn open<'a>(bytes: &'a [u8], path: &Path) -> Result<(NpyFile<&'a [u8]>, &'a [u8])> {
    let wrong = |found: String| Error::format(path, NPY, found);
    let (header, data) = split(bytes).map_err(|found| wrong(found.into()))?;
    guard(header).map_err(|found| wrong(found.into()))?;
    Ok((NpyFile::new(bytes).map_err(|e| wrong(one_line(&e)))?, data))
}

/// The crate's words quote the header, with its line ends and at any length.
fn one_line(text: &dyn std::fmt::Display) -> String {
    let words = text.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    words.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// The header's text and the data behind it, or what is wrong with the bytes.
fn split(bytes: &[u8]) -> Result<(&[u8], &[u8]), &'static str> {
    if bytes.is_empty() {
        return Err("an empty file");
    }
    if !bytes.starts_with(b"\x93NUMPY") {
        return Err("another kind of file (no NumPy signature)");
    }
    let cut = "a file cut off within its header";
    let (start, length) = match *bytes.get(6..).unwrap_or_default() {
        [1, _, a, b, ..] => (10, u16::from_le_bytes([a, b]) as usize),
        [2 | 3, _, a, b, c, d, ..] => (12, u32::from_le_bytes([a, b, c, d]) as usize),
        [1..=3, ..] | [] => return Err(cut),
        [..] => return Err("an unknown version of the format"),
    };
    if length > MAX_HEADER {
        return Err("an absurdly long header");
    }
    bytes[start..].split_at_checked(length).ok_or(cut)
}

/// Refuses headers that the crate's parser does not survive: its time is exponential in the
/// nesting of brackets, and it multiplies dimensions without a check.
fn guard(header: &[u8]) -> Result<(), &'static str> {
    if nesting(header).is_none_or(|depth| depth > MAX_NESTING) {
        return Err(
            "a header of deeply nested brackets or with escapes, which NumPy does not write",
        );
    }
    let after = header.windows(5).position(|w| w == b"shape").map_or(&[][..], |i| &header[i..]);
    let shape = after.split(|&b| b == b')').next().unwrap_or_default();
    if shape.iter().filter(|b| b.is_ascii_digit()).count() > MAX_SHAPE_DIGITS {
        return Err("an absurd shape");
    }
    Ok(())
}

/// How deep brackets stand in each other outside of quotes; none where a backslash or a second
/// dictionary makes that hard to tell.
fn nesting(header: &[u8]) -> Option<usize> {
    let (mut depth, mut deepest, mut braces) = (0usize, 0, 0);
    let mut quote = None;
    for &byte in header {
        match (quote, byte) {
            (_, b'\\') => return None,
            (Some(open), _) if byte == open => quote = None,
            (Some(_), _) => {}
            (None, b'\'' | b'"') => quote = Some(byte),
            (None, b'(' | b'[' | b'{') => {
                depth += 1;
                deepest = deepest.max(depth);
                braces += usize::from(byte == b'{');
            }
            (None, b')' | b']' | b'}') => depth = depth.saturating_sub(1),
            (None, _) => {}
        }
    }
    (braces < 2).then_some(deepest)
}

/// Values of a Fortran-ordered array (first index fastest) in C order (last index fastest).
fn c_order<T: Copy>(shape: &[usize], values: &[T]) -> Vec<T> {
    let mut strides = vec![1; shape.len()];
    for i in 1..shape.len() {
        strides[i] = strides[i - 1] * shape[i - 1];
    }
    let mut index = vec![0; shape.len()];
    let mut offset = 0;
    let mut out = Vec::with_capacity(values.len());
    for _ in 0..values.len() {
        out.push(values[offset]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            offset += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            offset -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    fn file(folder: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
        let path = folder.path().join("x.npy");
        fs::write(&path, bytes).unwrap();
        path
    }

    /// A version 1 file with the given header dictionary.
    fn npy(header: &str, data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(header.len()).unwrap().to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    }

    fn header(descr: &str, fortran: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}")
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npy");
        for shape in [vec![], vec![5], vec![2, 3, 1, 4], vec![0, 3]] {
            let data: Vec<f32> = (0..shape.iter().product()).map(|i| i as f32 * 0.1).collect();
            write_f32(&path, &shape, &data).unwrap();
            assert_eq!(read_f32(&path).unwrap(), (shape, data));
        }
        assert!(write_f32(&path, &[2, 2], &[0.0; 3]).is_err());
    }

    #[test]
    fn byte_order_and_memory_order_do_not_matter() {
        let folder = tempfile::tempdir().unwrap();
        // [[0, 1, 2], [3, 4, 5]] stored column by column
        let data = floats(&[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        let path = file(&folder, &npy(&header("<f4", "True", "(2, 3)"), &data));
        let expected = (vec![2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(read_f32(&path).unwrap(), expected);
        let big: Vec<u8> = expected.1.iter().flat_map(|v: &f32| v.to_be_bytes()).collect();
        let path = file(&folder, &npy(&header(">f4", "False", "(2, 3)"), &big));
        assert_eq!(read_f32(&path).unwrap(), expected);
    }

    #[test]
    fn wrong_files_get_an_error_that_tells_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let two = floats(&[1.0, 2.0]);
        let good = npy(&header("<f4", "False", "(2,)"), &two);
        let nested = |open: &str, n| format!("{{'shape': {}{}}}", open.repeat(n), ")".repeat(n));
        let records =
            "{'descr': [('a', [('b', '<f4', (2,))])], 'fortran_order': False, 'shape': (2,)}";
        let cases: [(&str, Vec<u8>); 18] = [
            ("empty", vec![]),
            ("signature", b"PNG and so on, long enough".to_vec()),
            ("cut off", good[..40].to_vec()),
            ("cut off", good[..9].to_vec()),
            ("version", b"\x93NUMPY\x09\x00\x00\x00".to_vec()),
            ("found 7 bytes", good[..good.len() - 1].to_vec()),
            ("found 12 bytes", [&good[..], &[0; 4]].concat()),
            ("dtype '<f8'", npy(&header("<f8", "False", "(1,)"), &[0; 8])),
            ("dtype '|u1'", npy(&header("|u1", "False", "(2,)"), &[0; 2])),
            ("absurd shape", npy(&header("<f4", "False", "(99999999999, 9999999999)"), &two)),
            ("8 bytes", npy(&header("<f4", "False", "(99999999, 999999999)"), &two)),
            ("brackets", npy(&nested("(", 3000), &[])),
            // What the parser would take years for: it tries each level twice or three times.
            ("brackets", npy(&nested("[", 31), &[])),
            ("brackets", npy(&nested("{", 20), &[])),
            ("brackets", npy(&nested("')', (1, ", 31), &[])),
            ("brackets", npy(r"{'\'': ')))))))))', 'shape': ((((((((((((((((((((((((1,))}", &[])),
            ("dtype [('a', [('b'", npy(records, &[])),
            ("missing key", npy("{'shape': (2,)}", &two)),
        ];
        for (expected, bytes) in cases {
            let message = read_f32(&file(&folder, &bytes)).unwrap_err().to_string();
            assert!(message.contains(expected), "{expected}: {message}");
            assert!(message.contains("x.npy") && !message.contains('\n'), "{message}");
        }
        assert!(read_u8(&file(&folder, &good)).is_err());
        assert!(read_f32(&file(&folder, &good)).is_ok());
    }
}
