//! The kernels in the binary: PTX by file and architecture, compiled by the driver when opened.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_char, c_void};

use cudarc::driver::result;
use cudarc::driver::sys::{
    self, CUfunction, CUfunction_attribute_enum as FunctionAttribute, CUjit_option, CUmodule,
    CUresult,
};

use super::probe::{check_driver, unusable};
use super::{driver_words, kernel_error};
use crate::error::{Error, Result};

/// PTX of one kernel file for one architecture.
pub(super) struct Module {
    /// File in kernels/ without its extension.
    name: &'static str,
    /// Compute capability times 10.
    arch: u32,
    /// CUDA version of the compiler.
    cuda: (u32, u32),
    /// What it wrote.
    ptx: &'static str,
}

// MODULES, written by build.rs; empty where there was no nvcc.
include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// The GPU that kernels are loaded for.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) name: String,
    /// Compute capability times 10.
    pub(super) capability: u32,
    /// CUDA version that the driver supports.
    pub(super) driver: (u32, u32),
}

/// A kernel, loaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function {
    pub(super) handle: CUfunction,
    /// Whether it waits for the kernel before it by itself, and so may start before that one ends.
    pub(super) waits: bool,
}

/// Every kernel of the binary, loaded for one GPU.
pub(super) struct Kernels {
    modules: Vec<CUmodule>,
    functions: HashMap<&'static str, Function>,
    /// Architectures of the PTX in use, ascending.
    pub(super) archs: Vec<u32>,
}

impl Kernels {
    /// Whether the binary holds any.
    pub(super) fn built() -> bool {
        !MODULES.is_empty()
    }

    /// Loads the best PTX of every kernel file for a GPU, and lets kernels use up to `shared_limit`
    /// bytes of shared memory per block. The context must be current.
    pub(super) fn load(gpu: &Gpu, shared_limit: usize) -> Result<Self> {
        let mut kernels =
            Kernels { modules: Vec::new(), functions: HashMap::new(), archs: Vec::new() };
        for module in select(MODULES, gpu)? {
            let handle = load_module(module)?;
            kernels.modules.push(handle);
            for (entry, body) in bodies(module.ptx) {
                let handle = load_function(handle, entry, shared_limit)?;
                let waits = body.contains("griddepcontrol.wait");
                kernels.functions.insert(entry, Function { handle, waits });
            }
            kernels.archs.push(module.arch);
        }
        kernels.archs.sort_unstable();
        kernels.archs.dedup();
        Ok(kernels)
    }

    /// A kernel by the name of its entry point.
    pub(super) fn get(&self, kernel: &str) -> Result<Function> {
        self.functions.get(kernel).copied().ok_or_else(|| Error::Kernel {
            kernel: kernel.into(),
            problem: "is not in this binary; build again (kernels/*.cu and code disagree)".into(),
        })
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        for module in &self.modules {
            // An error would be one of an earlier kernel, which has been reported.
            let _ = unsafe { result::module::unload(*module) };
        }
    }
}

/// The newest PTX of each file that the GPU can run and the driver can read.
fn select<'a>(modules: &'a [Module], gpu: &Gpu) -> Result<Vec<&'a Module>> {
    let mut files: BTreeMap<&str, Vec<&Module>> = BTreeMap::new();
    for module in modules {
        files.entry(module.name).or_default().push(module);
    }
    let newest = |mut file: Vec<&'a Module>| {
        file.retain(|module| module.arch <= gpu.capability);
        if let Some(oldest) = file.iter().map(|module| module.cuda).min() {
            check_driver(gpu.driver, oldest)?;
        }
        file.retain(|module| module.cuda <= gpu.driver);
        file.into_iter().max_by_key(|module| module.arch).ok_or_else(|| {
            let oldest = modules.iter().map(|module| module.arch).min().unwrap_or_default();
            let Gpu { name, capability, .. } = gpu;
            unusable(
                format!("{name} is sm_{capability}, the kernels in this binary need sm_{oldest}"),
                "run tools/install-nvcc.sh --sm70 and build again (nvcc 13 does not target sm_70)",
            )
        })
    };
    files.into_values().map(newest).collect()
}

/// The kernels in a PTX file: name and what follows it, up to the next kernel.
fn bodies(ptx: &str) -> impl Iterator<Item = (&str, &str)> {
    ptx.split(".entry ").skip(1).map(|text| {
        let name = text.lines().next().unwrap_or_default();
        (name.trim_end_matches(['(', ')', ' ']), text)
    })
}

fn load_module(module: &Module) -> Result<CUmodule> {
    let name = || format!("kernels/{}.cu (PTX for sm_{})", module.name, module.arch);
    let image = CString::new(module.ptx).map_err(|_| Error::Kernel {
        kernel: name(),
        problem: "its PTX holds a zero byte".into(),
    })?;
    let mut log = vec![0u8; 8192];
    let mut options =
        [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The size goes by value, in the place of a pointer.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void];
    let mut handle = std::ptr::null_mut();
    let status = unsafe {
        sys::cuModuleLoadDataEx(
            &mut handle,
            image.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    let Err(error) = status.result() else { return Ok(handle) };
    let words = driver_words(error);
    if let CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION = status {
        let remedy = "update the NVIDIA driver, or build with an older nvcc (variable NVCC)";
        return Err(unusable(format!("{}: {words}", name()), remedy));
    }
    // The driver ends its words with a zero byte where it wrote any.
    let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
    Err(Error::Kernel { kernel: name(), problem: format!("{words} {log}").trim().into() })
}

fn load_function(module: CUmodule, entry: &'static str, limit: usize) -> Result<CUfunction> {
    let name = CString::new(entry).unwrap_or_default();
    let load = || unsafe {
        let mut function = std::ptr::null_mut();
        let name: *const c_char = name.as_ptr();
        sys::cuModuleGetFunction(&mut function, module, name).result()?;
        // More than 48 KB of dynamic shared memory must be asked for, per kernel.
        let fixed = FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        let fixed = result::function::get_function_attribute(function, fixed)?;
        let dynamic = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let most = limit as i32 - fixed;
        result::function::set_function_attribute(function, dynamic, most)?;
        Ok(function)
    };
    load().map_err(|error| kernel_error(entry, "cannot be loaded", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = ".version 9.0\n.target sm_75\n\n\t// .globl\tscale_f32\n\
        .visible .entry scale_f32(\n\t.param .u64 scale_f32_param_0\n)\n{\n}\n\
        .visible .entry fill()\n{\n}\n";

    #[test]
    fn kernels_are_found_in_ptx() {
        let found: Vec<&str> = bodies(PTX).map(|(name, _)| name).collect();
        assert_eq!(found, ["scale_f32", "fill"]);
    }

    fn module(name: &'static str, arch: u32, cuda: (u32, u32)) -> Module {
        Module { name, arch, cuda, ptx: PTX }
    }

    fn gpu(capability: u32, driver: (u32, u32)) -> Gpu {
        Gpu { name: "NVIDIA TITAN V".into(), capability, driver }
    }

    #[test]
    fn every_file_is_taken_in_the_newest_form_that_the_gpu_runs() {
        let all = [(75, "a"), (90, "a"), (75, "b")].map(|(arch, name)| module(name, arch, (13, 0)));
        let archs = |capability| {
            let chosen = select(&all, &gpu(capability, (13, 1))).unwrap();
            chosen.iter().map(|module| (module.name, module.arch)).collect::<Vec<_>>()
        };
        assert_eq!(archs(75), [("a", 75), ("b", 75)]);
        assert_eq!(archs(89), [("a", 75), ("b", 75)]);
        assert_eq!(archs(120), [("a", 90), ("b", 75)]);
        let text = select(&all, &gpu(70, (13, 0))).err().unwrap().to_string();
        assert!(text.contains("NVIDIA TITAN V is sm_70") && text.contains("need sm_75"), "{text}");
    }

    #[test]
    fn a_driver_has_to_read_only_what_the_gpu_runs() {
        let all = [module("a", 70, (12, 9)), module("a", 75, (13, 0)), module("a", 90, (13, 0))];
        let arch = |capability, driver| select(&all, &gpu(capability, driver)).map(|m| m[0].arch);
        assert_eq!(arch(70, (12, 9)).unwrap(), 70);
        // An older form of the kernels is better than none.
        assert_eq!(arch(90, (12, 9)).unwrap(), 70);
        assert_eq!(arch(90, (13, 0)).unwrap(), 90);
        let text = arch(70, (12, 4)).unwrap_err().to_string();
        assert!(text.contains("supports CUDA 12.4") && text.contains("PTX of CUDA 12.9"), "{text}");
    }

    #[test]
    fn the_binary_holds_every_kernel_once_per_architecture() {
        let mut seen = std::collections::HashSet::new();
        for module in MODULES {
            let target = format!(".target sm_{}", module.arch);
            assert!(module.ptx.contains(&target), "{}: {target}", module.name);
            for (entry, _) in bodies(module.ptx) {
                assert!(seen.insert((entry, module.arch)), "{entry} is defined twice");
            }
        }
    }

    #[test]
    fn a_kernel_that_may_start_early_loads_only_through_coherent_caches() {
        for module in MODULES {
            for (entry, body) in bodies(module.ptx) {
                let early = body.contains("griddepcontrol.wait");
                assert!(!(early && body.contains("ld.global.nc")), "{entry}, sm_{}", module.arch);
            }
        }
    }

    #[test]
    fn kernels_wait_for_the_one_before_on_hopper_and_only_there() {
        let waits = |arch: u32, kernel: &str| {
            let modules = MODULES.iter().filter(|module| module.arch == arch);
            let mut all = modules.flat_map(|module| bodies(module.ptx));
            let found = all.find(|(name, _)| *name == kernel);
            found.map(|(_, body)| {
                (body.contains("griddepcontrol.wait"), body.contains("launch_dependents"))
            })
        };
        for kernel in
            ["pair_f16_c64_p64", "cascade_walk_f16", "conv1x1_f16_r64", "scores_argmax_f16"]
        {
            if MODULES.iter().any(|module| module.arch == 90) {
                assert_eq!(waits(90, kernel), Some((true, true)), "{kernel}");
            }
            if MODULES.iter().any(|module| module.arch == 75) {
                assert_eq!(waits(75, kernel), Some((false, false)), "{kernel}");
            }
        }
    }
}
