//! The kernels in the binary: PTX by file and architecture, compiled by the driver kernel by kernel, when
//! one is first wanted and several at a time: all of them take some twenty seconds of one core, those of
//! a plan a second or two. The driver keeps what it made on disk.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_char, c_void};
use std::num::NonZero;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use cudarc::driver::CudaContext;
use cudarc::driver::result;
use cudarc::driver::sys::{
    self, CUfunction, CUfunction_attribute_enum as FunctionAttribute, CUjit_option, CUmodule,
    CUresult,
};

use super::probe::{check_driver, unusable};
use super::{driver_words, kernel_error};
use crate::error::{Error, Result};

/// Compiling goes this long without a word.
const PATIENCE: Duration = Duration::from_secs(1);
/// Of a thread that compiles; the driver's compiler is used to a main thread's.
const STACK: usize = 16 << 20;

/// Who is told that kernels are being compiled.
static LISTENER: OnceLock<fn(&str)> = OnceLock::new();

/// Sets who is told, with the GPU's name, that its kernels are being compiled and that it takes a while;
/// the first call counts. Nobody is told otherwise.
pub fn on_compiling(listener: fn(&str)) {
    let _ = LISTENER.set(listener);
}

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

/// The kernels of the binary for one GPU, as far as they were wanted.
pub(super) struct Kernels {
    context: Arc<CudaContext>,
    gpu: Gpu,
    shared_limit: usize,
    sources: HashMap<&'static str, Source>,
    functions: HashMap<&'static str, Function>,
    modules: Vec<CUmodule>,
    /// Architectures of the PTX in use, ascending.
    pub(super) archs: Vec<u32>,
}

/// Where a kernel is compiled from.
struct Source {
    module: &'static Module,
    /// All kernels of that file.
    kernels: Arc<[Range<usize>]>,
    /// Which of them it is.
    index: usize,
    waits: bool,
}

/// What a thread that compiles hands back; only the driver looks into the handles.
struct Compiled {
    module: CUmodule,
    function: CUfunction,
}

unsafe impl Send for Compiled {}

impl Kernels {
    /// Whether the binary holds any.
    pub(super) fn built() -> bool {
        !MODULES.is_empty()
    }

    /// Takes the best PTX of every kernel file for a GPU, whose kernels may use up to `shared_limit` bytes
    /// of shared memory per block, and loads the smallest kernel of the newest to see that the driver
    /// takes it.
    pub(super) fn open(context: Arc<CudaContext>, gpu: Gpu, shared_limit: usize) -> Result<Self> {
        let chosen = select(MODULES, &gpu)?;
        let mut sources = HashMap::new();
        for module in &chosen {
            let kernels: Arc<[Range<usize>]> = kernels_in(module.ptx).into();
            for (index, (entry, body)) in bodies(module.ptx).enumerate() {
                let waits = body.contains("griddepcontrol.wait");
                sources.insert(entry, Source { module, kernels: kernels.clone(), index, waits });
            }
        }
        let mut archs: Vec<u32> = chosen.iter().map(|module| module.arch).collect();
        archs.sort_unstable();
        archs.dedup();
        let (functions, modules) = (HashMap::new(), Vec::new());
        let mut kernels =
            Kernels { context, gpu, shared_limit, sources, functions, modules, archs };
        kernels.probe()?;
        Ok(kernels)
    }

    fn probe(&mut self) -> Result<()> {
        let age = |source: &Source| std::cmp::Reverse((source.module.cuda, source.module.arch));
        let probe = self.sources.iter().min_by_key(|(entry, source)| {
            (age(source), source.kernels[source.index].len(), **entry)
        });
        let probe = probe.map(|(entry, _)| *entry);
        self.load(probe)
    }

    /// What the GPU is called.
    pub(super) fn gpu(&self) -> &str {
        &self.gpu.name
    }

    /// Loads those that are not yet, at the same time. The context must be current. Of several that cannot
    /// be loaded the error names the one with the most text.
    pub(super) fn load(&mut self, kernels: impl IntoIterator<Item = &'static str>) -> Result<()> {
        let mut missing: Vec<&'static str> = kernels.into_iter().collect();
        missing.sort_unstable();
        missing.dedup();
        missing.retain(|kernel| !self.functions.contains_key(kernel));
        let mut wanted = Vec::new();
        for kernel in missing {
            let source = self.sources.get(kernel).ok_or_else(|| Error::Kernel {
                kernel: kernel.into(),
                problem: "is not in this binary; build again (kernels/*.cu and code disagree)"
                    .into(),
            })?;
            wanted.push((kernel, source));
        }
        // The longest first: what is left for the end is short.
        wanted.sort_by_key(|(_, source)| std::cmp::Reverse(source.kernels[source.index].len()));
        let compile = |index: usize| -> Result<Compiled> {
            let (kernel, source) = wanted[index];
            source.compile(kernel, self.shared_limit)
        };
        let done = self.all(wanted.len(), &compile);
        let entries: Vec<_> =
            wanted.iter().map(|(kernel, source)| (*kernel, source.waits)).collect();
        let mut failed = None;
        for ((kernel, waits), compiled) in entries.into_iter().zip(done) {
            match compiled {
                Some(Ok(Compiled { module, function: handle })) => {
                    self.modules.push(module);
                    self.functions.insert(kernel, Function { handle, waits });
                }
                Some(Err(error)) if failed.is_none() => failed = Some(error),
                // Left out behind one that failed.
                Some(Err(_)) | None => {}
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// The results of so many jobs, by several threads where there are several. All jobs before one that
    /// fails are done.
    fn all(
        &self,
        jobs: usize,
        job: &(dyn Fn(usize) -> Result<Compiled> + Sync),
    ) -> Vec<Option<Result<Compiled>>> {
        let done: Mutex<Vec<Option<Result<Compiled>>>> =
            Mutex::new((0..jobs).map(|_| None).collect());
        let (next, end) = (AtomicUsize::new(0), AtomicUsize::new(jobs));
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= end.load(Ordering::Relaxed) {
                    return;
                }
                let result = job(index);
                if result.is_err() {
                    end.fetch_min(index, Ordering::Relaxed);
                }
                done.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(result);
            }
        };
        let workers = thread::available_parallelism().map_or(1, NonZero::get).min(jobs);
        if jobs > 1 {
            thread::scope(|scope| {
                let (started, over) = mpsc::channel::<()>();
                for _ in 0..workers {
                    let (started, context, work) = (started.clone(), &self.context, &work);
                    // Where no thread can be had the work is done below; a context that is lost says
                    // so there, too.
                    let _ =
                        thread::Builder::new().stack_size(STACK).spawn_scoped(scope, move || {
                            if context.bind_to_thread().is_ok() {
                                work();
                            }
                            drop(started);
                        });
                }
                drop(started);
                if let Err(mpsc::RecvTimeoutError::Timeout) = over.recv_timeout(PATIENCE)
                    && let Some(tell) = LISTENER.get()
                {
                    tell(&self.gpu.name);
                }
            });
        }
        work();
        done.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kernel by the name of its entry point, loaded now if it is not yet.
    pub(super) fn get(&mut self, kernel: &'static str) -> Result<Function> {
        if let Some(function) = self.functions.get(kernel) {
            return Ok(*function);
        }
        self.load([kernel])?;
        Ok(self.functions[kernel])
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

impl Source {
    fn compile(&self, kernel: &'static str, shared_limit: usize) -> Result<Compiled> {
        let module = load_module(self.module, &alone(self.module.ptx, &self.kernels, self.index))?;
        match load_function(module, kernel, shared_limit) {
            Ok(function) => Ok(Compiled { module, function }),
            Err(error) => {
                // The first error says more.
                let _ = unsafe { result::module::unload(module) };
                Err(error)
            }
        }
    }
}

/// Where the kernels of a PTX file lie in it, each from its directive to its closing brace.
fn kernels_in(ptx: &str) -> Vec<Range<usize>> {
    let kernel = |(at, _): (usize, &str)| {
        let start = ptx[..at].rfind('\n').map_or(0, |newline| newline + 1);
        // Assembly written by hand may have braces of its own, at the start of a line, too.
        let mut open = 0;
        let mut braces = ptx[at..].match_indices(['{', '}']);
        let end = braces.find_map(|(offset, brace)| {
            open += if brace == "{" { 1 } else { -1 };
            (open == 0).then_some(at + offset + 1)
        });
        let end = end.unwrap_or(ptx.len());
        start..end
    };
    ptx.match_indices(".entry ").map(kernel).collect()
}

/// A PTX file with one of its kernels only, and all that is beside them.
fn alone(ptx: &str, kernels: &[Range<usize>], index: usize) -> String {
    let others = kernels.iter().enumerate().filter(|(other, _)| *other != index);
    let (mut image, mut from) = (String::new(), 0);
    for (_, other) in others {
        image += &ptx[from..other.start];
        from = other.end;
    }
    image + &ptx[from..]
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

fn load_module(module: &Module, image: &str) -> Result<CUmodule> {
    let name = || format!("kernels/{}.cu (PTX for sm_{})", module.name, module.arch);
    let image = CString::new(image).map_err(|_| Error::Kernel {
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

    #[test]
    fn a_kernel_is_cut_out_with_what_is_beside_it() {
        let text = PTX.replacen("{\n}", "{\n{ // by hand\n}\n}", 1) + ".func helper()\n{\n}\n";
        let kernels = kernels_in(&text);
        let scale = alone(&text, &kernels, 0);
        assert!(
            scale.starts_with(".version 9.0\n.target sm_75\n") && scale.contains(".func helper")
        );
        assert!(
            scale.contains(".param .u64 scale_f32_param_0") && !scale.contains("fill"),
            "{scale}"
        );
        let fill = alone(&text, &kernels, 1);
        assert!(fill.contains(".entry fill()\n{\n}\n.func helper"), "{fill}");
        assert!(!fill.contains("scale_f32("), "{fill}");
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
            let kernels = kernels_in(module.ptx);
            for (index, (entry, _)) in bodies(module.ptx).enumerate() {
                let image = alone(module.ptx, &kernels, index);
                let found: Vec<&str> = bodies(&image).map(|(name, _)| name).collect();
                let count = |c: char| image.matches(c).count();
                assert!(found == [entry] && count('{') == count('}'), "{entry}: {found:?}");
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
