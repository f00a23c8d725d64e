//! The KV cache: pages of [`TILE`] positions, given to sessions as they grow.
//!
//! Opening a session reserves nothing. A page holds 64 positions, aligned to absolute position, for
//! all layers of the stage; it goes back to a free list when a session is truncated or dropped.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use swarm_kernels::{KvPage, KvType, TILE, f32_to_f16};

/// The shape of one page: `[layers, kv_heads, 2 (K, V), TILE, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub kv_type: KvType,
}

impl KvLayout {
    /// Bytes one position takes over all layers of the stage.
    pub fn bytes_per_position(&self) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * self.kv_type.bytes()
    }

    /// Bytes of one page.
    pub fn page_bytes(&self) -> usize {
        TILE * self.bytes_per_position()
    }

    fn page_len(&self) -> usize {
        2 * self.layers * self.kv_heads * TILE * self.head_dim
    }

    /// Where K of `layer` and `kv_head` begins in a page; V follows `TILE * head_dim` later.
    fn tile_start(&self, layer: usize, kv_head: usize) -> usize {
        2 * TILE * self.head_dim * (layer * self.kv_heads + kv_head)
    }
}

/// Why a session could not grow or shrink.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    #[error(
        "the KV cache is full: {wanted} more pages wanted, {free} of {max} free; close a session or give the cache more memory"
    )]
    Full { wanted: usize, free: usize, max: usize },
    #[error("cannot truncate a session of {len} positions to {to}")]
    TruncateBeyondEnd { len: usize, to: usize },
}

enum Page {
    F16(Box<[u16]>),
    F32(Box<[f32]>),
}

/// A budget of pages and the free ones. Cheap to clone; all clones share the budget.
#[derive(Clone)]
pub struct KvPool(Arc<Shared>);

struct Shared {
    layout: KvLayout,
    pages_max: usize,
    state: Mutex<PoolState>,
}

struct PoolState {
    lent: usize,
    free: Vec<Page>,
}

impl KvPool {
    /// A pool that never holds more than `budget_bytes`, rounded down to whole pages. Takes no
    /// memory yet.
    pub fn new(layout: KvLayout, budget_bytes: usize) -> Self {
        // A stage without layers has pages of no bytes; it needs no budget.
        let pages_max = budget_bytes.checked_div(layout.page_bytes()).unwrap_or(usize::MAX);
        Self(Arc::new(Shared {
            layout,
            pages_max,
            state: Mutex::new(PoolState { lent: 0, free: Vec::new() }),
        }))
    }

    /// An empty session. Reserves nothing.
    pub fn open(&self) -> SessionKv {
        SessionKv { shared: Arc::clone(&self.0), pages: Vec::new(), len: 0 }
    }

    /// The shape of the pages.
    pub fn layout(&self) -> KvLayout {
        self.0.layout
    }

    /// Pages the budget allows in all.
    pub fn pages_max(&self) -> usize {
        self.0.pages_max
    }

    /// Pages sessions hold now.
    pub fn pages_lent(&self) -> usize {
        self.0.state().lent
    }

    /// Bytes sessions hold now.
    pub fn bytes_lent(&self) -> usize {
        self.pages_lent().saturating_mul(self.0.layout.page_bytes())
    }

    /// Gives the memory of free pages back to the system.
    pub fn trim(&self) {
        let freed = std::mem::take(&mut self.0.state().free);
        drop(freed); // outside the lock
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, PoolState> {
        // The state is consistent at every instruction that can panic, so poison means nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `wanted` pages to `pages`, or none.
    fn lend(&self, wanted: usize, pages: &mut Vec<Page>) -> Result<(), KvError> {
        let mut state = self.state();
        let free = self.pages_max.saturating_sub(state.lent);
        if wanted > free {
            return Err(KvError::Full { wanted, free, max: self.pages_max });
        }
        state.lent += wanted;
        let reused = wanted.min(state.free.len());
        let keep = state.free.len() - reused;
        pages.extend(state.free.drain(keep..));
        drop(state);
        let len = self.layout.page_len();
        pages.extend((reused..wanted).map(|_| match self.layout.kv_type {
            KvType::F16 => Page::F16(vec![0; len].into_boxed_slice()),
            KvType::F32 => Page::F32(vec![0.0; len].into_boxed_slice()),
        }));
        Ok(())
    }
}

/// The KV rows of one session on one stage.
pub struct SessionKv {
    shared: Arc<Shared>,
    pages: Vec<Page>,
    len: usize,
}

impl SessionKv {
    /// Positions held: the next step must begin here.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first step.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the pages held.
    pub fn bytes(&self) -> usize {
        self.pages.len() * self.shared.layout.page_bytes()
    }

    /// The shape of its pages.
    pub fn layout(&self) -> KvLayout {
        self.shared.layout
    }

    /// Forgets every position from `len` on. Exact: what follows gives the bits it would have given
    /// had those positions never been. Costs no copy; pages no longer needed go back at once.
    ///
    /// # Errors
    /// [`KvError::TruncateBeyondEnd`] when fewer than `len` positions are held.
    pub fn truncate(&mut self, len: usize) -> Result<(), KvError> {
        if len > self.len {
            return Err(KvError::TruncateBeyondEnd { len: self.len, to: len });
        }
        self.len = len;
        self.release_spare();
        Ok(())
    }

    /// Takes the pages a session of `len` positions needs, or none and an error.
    pub(crate) fn reserve(&mut self, len: usize) -> Result<(), KvError> {
        let wanted = len.div_ceil(TILE).saturating_sub(self.pages.len());
        if wanted == 0 { Ok(()) } else { self.shared.lend(wanted, &mut self.pages) }
    }

    /// Gives back the pages beyond the committed positions.
    pub(crate) fn release_spare(&mut self) {
        let keep = self.len.div_ceil(TILE).min(self.pages.len());
        let mut state = self.shared.state();
        state.lent -= self.pages.len() - keep;
        state.free.extend(self.pages.drain(keep..));
    }

    /// Makes the `tokens` rows written behind the end part of the session.
    pub(crate) fn commit(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Stores one position of one layer; `k` and `v` are `[kv_heads, head_dim]`. The page is
    /// reserved already; the row counts only once committed.
    pub(crate) fn store(&mut self, layer: usize, position: usize, k: &[f32], v: &[f32]) {
        let layout = self.shared.layout;
        let head_dim = layout.head_dim;
        let page = &mut self.pages[position / TILE];
        for (kv_head, (k, v)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
            let k_start = layout.tile_start(layer, kv_head) + position % TILE * head_dim;
            let v_start = k_start + TILE * head_dim;
            match page {
                Page::F16(page) => {
                    f32_to_f16(k, &mut page[k_start..k_start + head_dim]);
                    f32_to_f16(v, &mut page[v_start..v_start + head_dim]);
                }
                Page::F32(page) => {
                    page[k_start..k_start + head_dim].copy_from_slice(k);
                    page[v_start..v_start + head_dim].copy_from_slice(v);
                }
            }
        }
    }

    /// K and V of one kv head for positions `tile * TILE ..`, each `[TILE, head_dim]`.
    pub(crate) fn tile(&self, layer: usize, kv_head: usize, tile: usize) -> (KvPage<'_>, KvPage<'_>) {
        let layout = self.shared.layout;
        let k_start = layout.tile_start(layer, kv_head);
        let v_start = k_start + TILE * layout.head_dim;
        let v_end = v_start + TILE * layout.head_dim;
        match &self.pages[tile] {
            Page::F16(page) => (KvPage::F16(&page[k_start..v_start]), KvPage::F16(&page[v_start..v_end])),
            Page::F32(page) => (KvPage::F32(&page[k_start..v_start]), KvPage::F32(&page[v_start..v_end])),
        }
    }
}

impl Drop for SessionKv {
    fn drop(&mut self) {
        self.len = 0;
        self.release_spare();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(kv_type: KvType) -> KvLayout {
        KvLayout { layers: 2, kv_heads: 3, head_dim: 4, kv_type }
    }

    #[test]
    fn opening_reserves_nothing_and_dropping_gives_all_back() {
        let pool = KvPool::new(layout(KvType::F16), 3 * layout(KvType::F16).page_bytes() + 1);
        assert_eq!(pool.pages_max(), 3);
        let mut kv = pool.open();
        assert_eq!((kv.bytes(), pool.pages_lent()), (0, 0));
        kv.reserve(TILE + 1).unwrap();
        assert_eq!(pool.pages_lent(), 2);
        drop(kv);
        assert_eq!(pool.pages_lent(), 0);
    }

    #[test]
    fn a_full_pool_refuses_and_changes_nothing() {
        let pool = KvPool::new(layout(KvType::F32), 2 * layout(KvType::F32).page_bytes());
        let (mut a, mut b) = (pool.open(), pool.open());
        a.reserve(1).unwrap();
        assert_eq!(b.reserve(2 * TILE), Err(KvError::Full { wanted: 2, free: 1, max: 2 }));
        assert_eq!((b.bytes(), pool.pages_lent()), (0, 1));
        drop(a);
        b.reserve(2 * TILE).unwrap();
    }

    #[test]
    fn stored_rows_come_back_where_they_belong() {
        let pool = KvPool::new(layout(KvType::F32), usize::MAX);
        let mut kv = pool.open();
        let row = |position: usize, layer: usize, sign: f32| -> Vec<f32> {
            (0..12).map(|i| sign * (position * 100 + layer * 50 + i) as f32).collect()
        };
        kv.reserve(TILE + 3).unwrap();
        for position in 0..TILE + 3 {
            for layer in 0..2 {
                kv.store(layer, position, &row(position, layer, 1.0), &row(position, layer, -1.0));
            }
        }
        kv.commit(TILE + 3);
        for (position, layer, head) in [(0, 0, 0), (TILE - 1, 1, 2), (TILE + 2, 0, 1)] {
            let (KvPage::F32(k), KvPage::F32(v)) = kv.tile(layer, head, position / TILE) else {
                panic!("an f32 pool gives f32 pages");
            };
            let at = position % TILE * 4;
            assert_eq!(k[at..at + 4], row(position, layer, 1.0)[head * 4..head * 4 + 4]);
            assert_eq!(v[at..at + 4], row(position, layer, -1.0)[head * 4..head * 4 + 4]);
        }
    }

    proptest! {
        /// Whatever sessions do, pages lent equal pages held, within the budget.
        #[test]
        fn pages_are_conserved(steps in prop::collection::vec((0usize..4, 0usize..300), 1..60)) {
            let page_bytes = layout(KvType::F16).page_bytes();
            let pool = KvPool::new(layout(KvType::F16), 9 * page_bytes);
            let mut sessions: Vec<SessionKv> = (0..4).map(|_| pool.open()).collect();
            for (session, len) in steps {
                let kv = &mut sessions[session];
                let before = kv.len();
                if len <= before {
                    kv.truncate(len).unwrap();
                } else if kv.reserve(len).is_ok() {
                    kv.commit(len - before);
                } else {
                    prop_assert_eq!(kv.len(), before);
                    prop_assert!(kv.truncate(len).is_err());
                }
                prop_assert_eq!(kv.bytes(), kv.len().div_ceil(TILE) * page_bytes);
                let held: usize = sessions.iter().map(SessionKv::bytes).sum();
                prop_assert_eq!(held, pool.bytes_lent());
                prop_assert!(pool.pages_lent() <= pool.pages_max());
            }
            drop(sessions);
            prop_assert_eq!(pool.pages_lent(), 0);
        }
    }
}
