//! Which of the CPU's instructions the kernels use: found out at run time, or forced by `SWARM_OS_KERNELS`.

use std::sync::OnceLock;

use crate::pack::{LANES, WIDE_LANES};

/// From this many tokens on, the paths that widen a panel of float weights once gain by it.
pub(crate) const PANEL_TOKENS: usize = 12;

/// A set of kernels. All give the same bits; they differ in speed.
///
/// Slowest first within one kind of CPU, which is the order [`KernelPath::best`] goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelPath {
    /// Plain Rust: the definition.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// As `Avx2`, with the int8 dot product of AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, VL and VNNI (and all that `Avx2` has).
    Avx512,
    /// AArch64 with NEON.
    Neon,
    /// As `Neon`, with the int8 dot product.
    NeonDot,
    /// As `NeonDot`, with the int8 matrix product.
    NeonI8mm,
}

/// Why the kernels that `SWARM_OS_KERNELS` asks for are not to be had. The asker's mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelPathError {
    #[error("SWARM_OS_KERNELS: no kernels are called {name:?}; this computer can run {}", names())]
    Unknown { name: String },
    #[error("SWARM_OS_KERNELS: this computer cannot run the kernels {name:?}; it can run {}", names())]
    NotHere { name: &'static str },
}

/// The names of what this CPU can run, for people.
fn names() -> String {
    KernelPath::available().iter().map(|path| path.name()).collect::<Vec<_>>().join(", ")
}

impl KernelPath {
    /// Every path there is a name for, here or elsewhere.
    const ALL: [Self; 7] =
        [Self::Scalar, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Neon, Self::NeonDot, Self::NeonI8mm];

    /// The path in use, decided once per process: what `SWARM_OS_KERNELS` names, else the best.
    ///
    /// # Panics
    /// When `SWARM_OS_KERNELS` names kernels that are not to be had: another set in their place would hide that. A program
    /// asks [`KernelPath::chosen`] when it starts and says so in its own way.
    pub fn current() -> Self {
        Self::chosen().unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`KernelPath::current`], without the panic.
    ///
    /// # Errors
    /// [`KernelPathError`] when `SWARM_OS_KERNELS` is set to anything but the name of an available path.
    pub fn chosen() -> Result<Self, KernelPathError> {
        static CHOSEN: OnceLock<Result<KernelPath, KernelPathError>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| match std::env::var_os("SWARM_OS_KERNELS") {
                Some(name) => Self::from_name(&name.to_string_lossy()),
                None => Ok(Self::best()),
            })
            .clone()
    }

    /// The path called `name`, if this CPU can run it.
    ///
    /// # Errors
    /// [`KernelPathError::Unknown`] for a name that no path has, [`KernelPathError::NotHere`] for one of another CPU.
    pub fn from_name(name: &str) -> Result<Self, KernelPathError> {
        match Self::ALL.into_iter().find(|path| path.name() == name) {
            Some(path) if path.is_available() => Ok(path),
            Some(path) => Err(KernelPathError::NotHere { name: path.name() }),
            None => Err(KernelPathError::Unknown { name: name.to_owned() }),
        }
    }

    /// The paths that this CPU can run, slowest first; the scalar one is always there.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|path| path.is_available()).collect()
    }

    /// The fastest path this CPU has.
    pub fn best() -> Self {
        Self::ALL.into_iter().rfind(|path| path.is_available()).unwrap_or(Self::Scalar)
    }

    /// The name `SWARM_OS_KERNELS` uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
            Self::NeonI8mm => "neoni8mm",
        }
    }

    /// Whether this build has the path and this CPU its instructions. Cheap: the CPU is asked once.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => Self::NeonDot.is_available() && std::arch::is_aarch64_feature_detected!("i8mm"),
            _ => false,
        }
    }

    /// Whether AVX2, FMA and F16C may be used on this path.
    pub(crate) const fn has_avx2(self) -> bool {
        matches!(self, Self::Avx2 | Self::AvxVnni | Self::Avx512)
    }

    /// Whether quantized weights meet activations through `vpdpbusd`.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const fn has_vnni(self) -> bool {
        matches!(self, Self::AvxVnni | Self::Avx512)
    }

    /// Whether float activations of this many tokens lie by columns (`activation.rs`).
    pub(crate) const fn takes_columns(self, tokens: usize) -> bool {
        self.has_avx2() && tokens >= PANEL_TOKENS
    }

    /// Rows in a group of packed weights.
    pub(crate) const fn lanes(self) -> usize {
        if matches!(self, Self::Avx512) { WIDE_LANES } else { LANES }
    }

    /// Rows that are better taken together: those of a tile of many tokens, or a group. A multiple of [`KernelPath::lanes`].
    pub(crate) const fn rows_at_once(self) -> usize {
        match self {
            Self::Avx512 => 2 * WIDE_LANES,
            Self::Avx2 | Self::AvxVnni => WIDE_LANES,
            _ => LANES,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_strangers_are_refused() {
        for path in KernelPath::ALL {
            let want = if KernelPath::available().contains(&path) {
                Ok(path)
            } else {
                Err(KernelPathError::NotHere { name: path.name() })
            };
            assert_eq!(KernelPath::from_name(path.name()), want);
        }
        for name in ["", "AVX2", "avx2 ", "best"] {
            let error = KernelPath::from_name(name).unwrap_err();
            assert_eq!(error, KernelPathError::Unknown { name: name.to_owned() });
            assert!(error.to_string().contains("scalar"), "{error}");
        }
    }

    #[test]
    fn the_best_is_available_and_scalar_always_is() {
        let available = KernelPath::available();
        assert_eq!(available.first(), Some(&KernelPath::Scalar));
        assert_eq!(available.last(), Some(&KernelPath::best()));
    }
}
