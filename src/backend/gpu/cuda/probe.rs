//! Whether CUDA can be used at all, found out before any call that needs it: cudarc panics where
//! a library is missing, and a driver that is too old fails with words that help nobody.

use cudarc::driver::sys;

use crate::error::{Error, Result};

/// Oldest driver whose interface has every call made here (CUDA graphs as of 11.4 and later).
const OLDEST_DRIVER: (u32, u32) = (12, 0);

/// What was found in this binary and on this machine.
#[derive(Debug, Clone, Copy)]
struct Parts {
    /// PTX inside the binary.
    kernels: bool,
    /// libcuda, which comes with the driver.
    driver: bool,
    /// libcublas.
    cublas: bool,
}

/// Checks that the binary holds `kernels`, that driver and cuBLAS are there, and that the driver is
/// new enough for the calls made here. Returns the CUDA version that the driver supports.
///
/// # Errors
/// [`Error::Device`] with everything that is missing and how to get it.
pub(super) fn probe(kernels: bool) -> Result<(u32, u32)> {
    // Both only try to open a library by its usual names.
    let (driver, cublas) =
        unsafe { (sys::is_culib_present(), cudarc::cublas::sys::is_culib_present()) };
    missing(Parts { kernels, driver, cublas })?;
    let mut version = 0;
    // Needs no initialisation and is in every driver.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|error| unusable(super::driver_words(error), "reinstall the NVIDIA driver"))?;
    let version = split(version);
    check_driver(version, OLDEST_DRIVER)?;
    Ok(version)
}

/// The error for what is missing, if anything.
fn missing(parts: Parts) -> Result<()> {
    let all = [
        (
            parts.kernels,
            "this binary was built without nvcc and holds no CUDA kernels",
            "run tools/install-nvcc.sh and build again",
        ),
        (
            parts.driver,
            "there is no NVIDIA driver (libcuda.so.1)",
            "install the driver of your GPU",
        ),
        (
            parts.cublas,
            "there is no cuBLAS (libcublas.so.13 or .12)",
            "install it (pip install nvidia-cublas, or the CUDA toolkit) and put its folder on \
             LD_LIBRARY_PATH",
        ),
    ];
    let absent: Vec<_> = all.iter().filter(|(present, ..)| !present).collect();
    if absent.is_empty() {
        return Ok(());
    }
    let join = |words: Vec<&str>| words.join(", ");
    Err(unusable(
        join(absent.iter().map(|(_, problem, _)| *problem).collect()),
        join(absent.iter().map(|(_, _, remedy)| *remedy).collect()),
    ))
}

/// Checks a driver against the CUDA version of the compiler that made PTX: it loads its own and older.
///
/// # Errors
/// [`Error::Device`] with both versions and the remedy.
pub(super) fn check_driver(driver: (u32, u32), ptx: (u32, u32)) -> Result<()> {
    let needed = ptx.max(OLDEST_DRIVER);
    if driver >= needed {
        return Ok(());
    }
    let show = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    let mut remedy = format!("update the NVIDIA driver to one for CUDA {} or newer", show(needed));
    if driver >= OLDEST_DRIVER {
        let driver = show(driver);
        remedy += &format!(", or build with an nvcc of CUDA {driver} or older (variable NVCC)");
    }
    Err(unusable(
        format!(
            "the driver is too old: it supports CUDA {}, the kernels in this binary are PTX of \
             CUDA {}",
            show(driver),
            show(ptx)
        ),
        remedy,
    ))
}

/// An error of the device as a whole.
pub(super) fn unusable(problem: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::Device { device: "cuda".into(), problem: problem.into(), remedy: remedy.into() }
}

/// The driver's release as the system names it ("driver 580.95.05"), else the CUDA version that it
/// supports: two releases may compile the same PTX to different code.
pub(super) fn driver_release((major, minor): (u32, u32)) -> String {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    match release(&text) {
        Some(release) => format!("driver {release}"),
        None => format!("driver for CUDA {major}.{minor}"),
    }
}

/// The first word of the form 580.95.05.
fn release(text: &str) -> Option<&str> {
    text.split_whitespace().find(|word| {
        let parts: Vec<&str> = word.split('.').collect();
        (2..=3).contains(&parts.len()) && parts.iter().all(|part| part.parse::<u32>().is_ok())
    })
}

/// 13000 -> (13, 0), as the driver writes it.
fn split(version: i32) -> (u32, u32) {
    let version = version.unsigned_abs();
    (version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_missing_is_named_with_its_remedy() {
        let text = |kernels, driver, cublas| {
            missing(Parts { kernels, driver, cublas }).unwrap_err().to_string()
        };
        let nothing = text(false, false, false);
        for word in ["nvcc", "libcuda.so.1", "libcublas", "install-nvcc.sh", "LD_LIBRARY_PATH"] {
            assert!(nothing.contains(word), "{word} in {nothing}");
        }
        let no_driver = text(true, false, true);
        assert!(no_driver.contains("libcuda.so.1") && !no_driver.contains("nvcc"), "{no_driver}");
        assert!(missing(Parts { kernels: true, driver: true, cublas: true }).is_ok());
    }

    #[test]
    fn an_old_driver_is_told_both_versions_and_a_remedy() {
        assert!(check_driver((13, 0), (13, 0)).is_ok());
        assert!(check_driver((13, 1), (12, 9)).is_ok());
        let text = check_driver((12, 4), (13, 0)).unwrap_err().to_string();
        assert!(text.contains("CUDA 12.4, the kernels in this binary are PTX of CUDA 13.0"));
        assert!(text.contains("update the NVIDIA driver to one for CUDA 13.0"), "{text}");
        assert!(text.contains("nvcc of CUDA 12.4"), "{text}");
        // Older than the interface: another nvcc would not help.
        let text = check_driver((11, 2), OLDEST_DRIVER).unwrap_err().to_string();
        assert!(text.contains("CUDA 12.0 or newer") && !text.contains("variable NVCC"), "{text}");
    }

    #[test]
    fn the_release_is_found_in_the_words_of_both_kernel_modules() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n\
            GCC version:  gcc version 12.2.0";
        assert_eq!(release(closed), Some("550.54.15"));
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release";
        assert_eq!(release(open), Some("580.95.05"));
        assert_eq!(release("no driver here"), None);
        assert!(driver_release((13, 0)).starts_with("driver "));
    }

    #[test]
    fn versions_are_read_as_the_driver_writes_them() {
        assert_eq!(split(13000), (13, 0));
        assert_eq!(split(12090), (12, 9));
    }
}
