//! Generations: each phase of a generation's life is a type.
//!
//! ```text
//!  Intended ──▶ Placed ──▶ Fenced ──▶ released: nothing of it is left
//!     └───────────────────────▲
//! ```
//!
//! Invariants: only [`Generations::fence`](crate::generation::Generations::fence) and the journal create a
//! [`Generation<Fenced>`], each from the generation named in the certificate. Release takes only that type, so a
//! certificate never frees the resources of another generation:
//!
//! ```
//! use kmorph_actors::generation::Generations;
//! use kmorph_actors::model::generation::{Fenced, Generation};
//!
//! async fn release(generations: &Generations, fenced: Generation<Fenced>) {
//!     let _ = generations.release(fenced).await;
//! }
//! ```
//!
//! ```compile_fail,E0308
//! use kmorph_actors::generation::Generations;
//! use kmorph_actors::model::generation::{Generation, Placed};
//!
//! async fn release(generations: &Generations, placed: Generation<Placed>) {
//!     let _ = generations.release(placed).await;
//! }
//! ```

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;

use kmorph_backends::contract::Placement;
use kmp_proto::fence::FenceCertificate;

use super::rows::{CertificateRow, GenerationPhase, GenerationRow, KernelChoice};

/// The facts about a generation that all phases share.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// The instance.
    pub instance: String,
    /// Its generation number.
    pub generation: u64,
    /// Its kernel.
    pub kernel: KernelChoice,
    /// Its vsock context id.
    pub cid: u32,
    /// CPUs it holds.
    pub cpus: Vec<u16>,
    /// Memory it holds, in bytes.
    pub memory_bytes: u64,
    /// Its runtime directory.
    pub run_dir: PathBuf,
    /// When it was intended, RFC 3339.
    pub spawned_at: String,
    /// A capture of its memory froze it, or was about to. The next daemon resumes it.
    pub frozen: bool,
    /// The boot id of its first HELLO.
    pub boot_id: Option<[u8; 16]>,
    /// The daemon has decided to end it; it may still run.
    pub ending: bool,
}

/// The generation number is taken; a spawn may or may not have happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Intended(());

/// The backend has started it.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    placement: Placement,
}

/// Its end is confirmed.
#[derive(Clone, Debug, PartialEq)]
pub struct Fenced {
    placement: Option<Placement>,
    certificate: FenceCertificate,
    proof: Option<String>,
}

/// A generation in the phase `P`: [`Intended`], [`Placed`] or [`Fenced`].
#[derive(Clone, Debug, PartialEq)]
pub struct Generation<P> {
    facts: Facts,
    phase: P,
}

/// A generation in any phase.
#[derive(Clone, Debug, PartialEq)]
pub enum AnyGeneration {
    /// See [`Intended`].
    Intended(Generation<Intended>),
    /// See [`Placed`].
    Placed(Generation<Placed>),
    /// See [`Fenced`].
    Fenced(Generation<Fenced>),
}

impl<P> Deref for Generation<P> {
    type Target = Facts;

    fn deref(&self) -> &Facts {
        &self.facts
    }
}

impl<P> DerefMut for Generation<P> {
    fn deref_mut(&mut self) -> &mut Facts {
        &mut self.facts
    }
}

impl Deref for AnyGeneration {
    type Target = Facts;

    fn deref(&self) -> &Facts {
        match self {
            Self::Intended(generation) => generation,
            Self::Placed(generation) => generation,
            Self::Fenced(generation) => generation,
        }
    }
}

impl DerefMut for AnyGeneration {
    fn deref_mut(&mut self) -> &mut Facts {
        match self {
            Self::Intended(generation) => generation,
            Self::Placed(generation) => generation,
            Self::Fenced(generation) => generation,
        }
    }
}

impl Generation<Intended> {
    /// Returns a new generation: its number is taken, nothing is started.
    pub fn intended(facts: Facts) -> Self {
        Self {
            facts,
            phase: Intended(()),
        }
    }

    /// Returns this generation, started at `placement`.
    pub fn placed(self, placement: Placement) -> Generation<Placed> {
        Generation {
            facts: self.facts,
            phase: Placed { placement },
        }
    }
}

impl Generation<Placed> {
    /// Returns its location.
    pub fn placement(&self) -> &Placement {
        &self.phase.placement
    }
}

impl Generation<Fenced> {
    /// Returns its location, if the backend started it.
    pub fn placement(&self) -> Option<&Placement> {
        self.phase.placement.as_ref()
    }

    /// Returns the proof of its end.
    pub fn certificate(&self) -> &FenceCertificate {
        &self.phase.certificate
    }

    /// Returns the evidence of the fence; `None` if the generation never started, so that no query was needed.
    pub fn proof(&self) -> Option<&str> {
        self.phase.proof.as_deref()
    }
}

impl AnyGeneration {
    /// Returns its present or last location, if the backend is known to have started it.
    pub fn placement(&self) -> Option<&Placement> {
        match self {
            Self::Intended(_) => None,
            Self::Placed(generation) => Some(generation.placement()),
            Self::Fenced(generation) => generation.placement(),
        }
    }

    /// Returns the proof of its end, once that is confirmed.
    pub fn certificate(&self) -> Option<&FenceCertificate> {
        match self {
            Self::Intended(_) | Self::Placed(_) => None,
            Self::Fenced(generation) => Some(generation.certificate()),
        }
    }

    /// Returns this generation; if it is intended and `placement` is given, it becomes placed.
    #[must_use]
    pub fn found(self, placement: Option<Placement>) -> Self {
        match (self, placement) {
            (Self::Intended(generation), Some(placement)) => {
                Self::Placed(generation.placed(placement))
            }
            (generation, _) => generation,
        }
    }

    /// Returns this generation as fenced. The caller has confirmed its end.
    pub(crate) fn fenced(
        self,
        certificate: FenceCertificate,
        proof: Option<String>,
    ) -> Generation<Fenced> {
        let (facts, placement) = match self {
            Self::Intended(generation) => (generation.facts, None),
            Self::Placed(generation) => (generation.facts, Some(generation.phase.placement)),
            Self::Fenced(generation) => return generation,
        };
        Generation {
            facts,
            phase: Fenced {
                placement,
                certificate,
                proof,
            },
        }
    }
}

impl From<Generation<Intended>> for AnyGeneration {
    fn from(generation: Generation<Intended>) -> Self {
        Self::Intended(generation)
    }
}

impl From<Generation<Placed>> for AnyGeneration {
    fn from(generation: Generation<Placed>) -> Self {
        Self::Placed(generation)
    }
}

impl From<Generation<Fenced>> for AnyGeneration {
    fn from(generation: Generation<Fenced>) -> Self {
        Self::Fenced(generation)
    }
}

/// A row with inconsistent parts, or with a certificate that this version does not know, becomes a generation that the
/// daemon fences (again): that is always safe.
impl From<GenerationRow> for AnyGeneration {
    fn from(row: GenerationRow) -> Self {
        let certificate = row.certificate.as_ref().and_then(|at_rest| {
            let certificate = FenceCertificate::restore_from_journal(
                row.generation,
                &at_rest.method,
                &at_rest.confirmation,
                at_rest.fenced_at_unix_ns,
            )?;
            Some((certificate, at_rest.proof.clone()))
        });
        let intended = Generation::intended(Facts {
            instance: row.instance,
            generation: row.generation,
            kernel: row.kernel,
            cid: row.cid,
            cpus: row.cpus,
            memory_bytes: row.memory_bytes,
            run_dir: row.run_dir,
            spawned_at: row.spawned_at,
            frozen: row.frozen,
            boot_id: row.boot_id,
            ending: row.phase >= GenerationPhase::Fencing,
        });
        let generation = Self::Intended(intended).found(row.placement);
        match certificate {
            Some((certificate, proof)) => Self::Fenced(generation.fenced(certificate, proof)),
            None => generation,
        }
    }
}

impl From<&AnyGeneration> for GenerationRow {
    fn from(generation: &AnyGeneration) -> Self {
        let facts: &Facts = generation;
        let (phase, certificate) = match generation {
            _ if facts.ending && generation.certificate().is_none() => {
                (GenerationPhase::Fencing, None)
            }
            AnyGeneration::Intended(_) => (GenerationPhase::Intended, None),
            AnyGeneration::Placed(_) => (GenerationPhase::Placed, None),
            AnyGeneration::Fenced(fenced) => (GenerationPhase::Fenced, Some(at_rest(fenced))),
        };
        Self {
            instance: facts.instance.clone(),
            generation: facts.generation,
            phase,
            kernel: facts.kernel.clone(),
            cid: facts.cid,
            cpus: facts.cpus.clone(),
            memory_bytes: facts.memory_bytes,
            run_dir: facts.run_dir.clone(),
            placement: generation.placement().cloned(),
            certificate,
            spawned_at: facts.spawned_at.clone(),
            frozen: facts.frozen,
            boot_id: facts.boot_id,
        }
    }
}

fn at_rest(fenced: &Generation<Fenced>) -> CertificateRow {
    let certificate = fenced.certificate();
    CertificateRow {
        method: certificate.method().as_str().to_owned(),
        confirmation: certificate.confirmation().as_str().to_owned(),
        fenced_at_unix_ns: certificate.fenced_at_unix_ns(),
        proof: fenced.proof().map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use kmp_proto::fence::{Confirmation, FenceMethod, FenceOrder};

    use super::*;

    fn row(phase: GenerationPhase) -> GenerationRow {
        GenerationRow {
            instance: "web".to_owned(),
            generation: 3,
            phase,
            kernel: KernelChoice {
                path: "/boot/vmlinuz".into(),
                release: "6.1".to_owned(),
                sha256: "00".to_owned(),
                cmdline: String::new(),
                initramfs: None,
            },
            cid: 7,
            cpus: vec![1],
            memory_bytes: 1 << 20,
            run_dir: "/run/kmorph/instances/web/3".into(),
            placement: None,
            certificate: None,
            spawned_at: "2026-01-01T00:00:00Z".to_owned(),
            frozen: true,
            boot_id: Some([5; 16]),
        }
    }

    #[test]
    fn a_row_comes_back_from_each_phase_as_it_was() {
        for phase in [GenerationPhase::Intended, GenerationPhase::Fencing] {
            let row = row(phase);
            assert_eq!(GenerationRow::from(&AnyGeneration::from(row.clone())), row);
        }
        let never = FenceOrder::new(3).confirm(
            FenceMethod::NeverStarted,
            Confirmation::NothingFound,
            1_700_000_000,
        );
        let fenced = AnyGeneration::from(row(GenerationPhase::Fencing)).fenced(never, None);
        let row = GenerationRow::from(&AnyGeneration::from(fenced.clone()));
        assert_eq!(row.phase, GenerationPhase::Fenced);
        assert_eq!(AnyGeneration::from(row), AnyGeneration::Fenced(fenced));
    }

    #[test]
    fn a_certificate_that_cannot_be_read_proves_nothing() {
        let unknown = GenerationRow {
            certificate: Some(CertificateRow {
                method: "asked_nicely".to_owned(),
                confirmation: "nothing_found".to_owned(),
                fenced_at_unix_ns: 1,
                proof: None,
            }),
            ..row(GenerationPhase::Fenced)
        };
        let generation = AnyGeneration::from(unknown);
        assert!(matches!(generation, AnyGeneration::Intended(_)));
        assert!(generation.ending, "it is fenced again, and not adopted");
    }
}
