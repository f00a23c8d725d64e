//! Model files that count what is read of them.

use std::path::Path;
use std::sync::{Arc, Mutex};

use swarm_weights::{Checkpoint, FileSource, Source, SourceError};

struct Counting {
    inner: FileSource,
    reads: Arc<Mutex<u64>>,
}

impl Source for Counting {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        *self.reads.lock().unwrap() += out.len() as u64;
        self.inner.read_at(offset, out)
    }
}

/// The model in `folder`, and the bytes of its files that were read so far.
pub fn open_counting(folder: &Path) -> (Checkpoint, Arc<Mutex<u64>>) {
    let reads = Arc::new(Mutex::new(0));
    let opener = |path: &Path| {
        let inner = FileSource::open(path)?;
        Ok(Arc::new(Counting { inner, reads: reads.clone() }) as Arc<dyn Source>)
    };
    (Checkpoint::open_with(folder, &opener).unwrap(), reads)
}
