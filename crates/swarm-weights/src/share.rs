//! A model as other nodes get it from here: its files by name, and their bytes by range.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::checkpoint::{Checkpoint, Format};
use crate::error::WeightsError;
use crate::gguf::split;
use crate::hub::is_file_name;
use crate::open::{CONFIG_FILE, INDEX_FILE};
use crate::source::{Source, SourceError};
use crate::store::{GENERATION_FILE, Needs, StoreError, TOKENIZER_FILES, fetch_through};

/// Small files that are longer are not handed on: an index has some megabytes.
pub(crate) const SHARED_SMALL_BYTES_MAX: u64 = 64 << 20;

/// A file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedFile {
    /// Its path in the repository, or one that files without a repository are given.
    pub name: String,
    pub bytes: u64,
    /// The Hub's tag of its content.
    pub tag: Option<String>,
    /// No weights: needed whole before the model can be opened.
    pub small: bool,
}

/// What there is of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Its bytes were read; this is their blake3.
    Here([u8; 32]),
    /// This process is fetching it.
    Coming,
    Absent,
}

enum Content {
    Small(Vec<u8>),
    Weights(Arc<dyn Source>),
}

/// The files of a checkpoint, open to be read by whoever serves them to other nodes.
pub struct Share {
    files: Vec<SharedFile>,
    contents: Vec<Content>,
    promised: Mutex<Vec<(usize, Vec<Range<u64>>)>>,
}

/// As long as it lives, the bytes it was made for count as coming.
pub struct Promise<'a>(&'a Share);

impl Checkpoint {
    /// Opens the files for [`Share::piece`]. Reads the small ones.
    ///
    /// # Errors
    /// [`WeightsError`], also for file names that other nodes could not write down.
    pub fn share(&self) -> Result<Share, WeightsError> {
        self.share_for(Needs::WeightsOnly)
    }

    /// [`Checkpoint::share`], with the tokenizer's files for who needs them. A GGUF file has its own inside.
    ///
    /// # Errors
    /// As [`Checkpoint::share`].
    pub fn share_for(&self, needs: Needs) -> Result<Share, WeightsError> {
        let (mut files, mut contents) = (Vec::new(), Vec::new());
        if self.format() == Format::Safetensors {
            let tokenizer = if needs == Needs::Everything { &TOKENIZER_FILES[..] } else { &[] };
            for name in [CONFIG_FILE, GENERATION_FILE, INDEX_FILE].iter().chain(tokenizer).copied() {
                let Some(bytes) = crate::hf::read_optional(&self.path().join(name), SHARED_SMALL_BYTES_MAX)?
                else {
                    continue;
                };
                let (name, len) = (name.to_owned(), bytes.len() as u64);
                files.push(SharedFile { name, bytes: len, tag: None, small: true });
                contents.push(Content::Small(bytes));
            }
        }
        let sources = self.sources();
        for (index, source) in sources.iter().enumerate() {
            let (name, tag) = match source.stored() {
                Some(stored) => (stored.remote.path.clone(), stored.remote.tag.clone()),
                None => (self.shared_name(index, sources.len(), source.name()), None),
            };
            if !is_file_name(&name) {
                let why = "its name has characters that not every file system can write".to_owned();
                return Err(WeightsError::File { file: source.name().to_owned(), why });
            }
            files.push(SharedFile { name, bytes: source.len(), tag, small: false });
            contents.push(Content::Weights(source.clone()));
        }
        Ok(Share { files, contents, promised: Mutex::default() })
    }

    /// The name of a whole file: the repository's where there is one, since its digest counts the name in; the index's
    /// own for safetensors; for a GGUF file of the user's own, whose name may be anything, a plain one.
    fn shared_name(&self, index: usize, count: usize, path: &str) -> String {
        let own = || Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
        match (self.format(), self.origin().and_then(|origin| origin.file.as_deref())) {
            (Format::Safetensors, _) => own(),
            (Format::Gguf, Some(file)) => split::parts(file).get(index).cloned().unwrap_or_else(own),
            (Format::Gguf, None) if count == 1 => "model.gguf".to_owned(),
            (Format::Gguf, None) => format!("model-{:05}-of-{count:05}.gguf", index.saturating_add(1)),
        }
    }
}

impl Share {
    pub fn files(&self) -> &[SharedFile] {
        &self.files
    }

    /// Reads a piece into `out` if it is here. `None` when there is no such file, or it is shorter.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn piece(
        &self,
        file: usize,
        range: &Range<u64>,
        out: &mut Vec<u8>,
    ) -> Result<Option<Found>, SourceError> {
        let (Some(shared), Some(content)) = (self.files.get(file), self.contents.get(file)) else {
            return Ok(None);
        };
        let len = range.end.checked_sub(range.start).filter(|_| range.end <= shared.bytes);
        let Some(len) = len.and_then(|len| usize::try_from(len).ok()) else { return Ok(None) };
        match content {
            Content::Small(bytes) => {
                let part = usize::try_from(range.start).ok().and_then(|start| bytes.get(start..)?.get(..len));
                out.clear();
                out.extend_from_slice(part.unwrap_or_default());
            }
            Content::Weights(source) => match source.stored() {
                Some(stored) => {
                    if let Some(digest) = stored.held_piece(range, out)? {
                        return Ok(Some(Found::Here(digest)));
                    }
                    let coming = stored.missing(std::slice::from_ref(range)).is_empty()
                        || self.is_promised(file, range);
                    return Ok(Some(if coming { Found::Coming } else { Found::Absent }));
                }
                None => {
                    // A buffer that is used again is not filled with zeros first.
                    out.resize(len, 0);
                    source.read_at(range.start, out)?;
                }
            },
        }
        Ok(Some(Found::Here(*blake3::hash(out).as_bytes())))
    }

    /// Waits until more of a file is here, or nothing more is promised, or for `within`.
    pub fn wait(&self, file: usize, within: Duration) {
        if let Some(Content::Weights(source)) = self.contents.get(file)
            && let Some(stored) = source.stored()
        {
            stored.wait(within);
        }
    }

    /// From now on the stage's bytes count as coming: this process is about to fetch them.
    pub fn promise(&self, model: &Checkpoint, layers: Range<usize>) -> Promise<'_> {
        let small = self.files.iter().filter(|file| file.small).count();
        let mut promised: Vec<(usize, Vec<Range<u64>>)> = Vec::new();
        for info in model.stage_tensors(layers) {
            let (file, range) =
                (small.saturating_add(info.source), info.offset..info.offset.saturating_add(info.bytes));
            match promised.iter_mut().find(|(of, _)| *of == file) {
                Some((_, ranges)) => ranges.push(range),
                None => promised.push((file, vec![range])),
            }
        }
        *self.promises() = promised;
        Promise(self)
    }

    fn promises(&self) -> MutexGuard<'_, Vec<(usize, Vec<Range<u64>>)>> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_promised(&self, file: usize, range: &Range<u64>) -> bool {
        let inside = |promised: &Range<u64>| promised.start <= range.start && range.end <= promised.end;
        self.promises().iter().any(|(of, ranges)| *of == file && ranges.iter().any(inside))
    }

    /// Brings pieces of a file from the Hub past this node's own disk: each is given to `each` and kept nowhere. In order, and
    /// several requests at once.
    /// With `lenders`, where the Hub cannot be reached, from the node that this one has the model from.
    ///
    /// # Errors
    /// [`StoreError`]; of a file that the Hub does not have as well.
    pub fn through(
        &self,
        file: usize,
        pieces: &[Range<u64>],
        lenders: bool,
        each: &mut dyn FnMut(&Range<u64>, &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let stored = match self.contents.get(file) {
            Some(Content::Weights(source)) => source.stored(),
            _ => None,
        };
        match stored {
            Some(stored) => fetch_through(stored, pieces, lenders, each),
            None => Err(StoreError::NoHub {
                file: self.files.get(file).map_or_else(String::new, |file| file.name.clone()),
            }),
        }
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.0.promises().clear();
        for content in &self.0.contents {
            if let Content::Weights(source) = content
                && let Some(stored) = source.stored()
            {
                stored.wake();
            }
        }
    }
}
