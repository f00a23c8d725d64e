//! The engine of one `SwarmMaster`.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict, PyList};
use serde_json::{Value, json};
use swarm_node::{EncodeOptions, Engine as NodeEngine, Finish, NodeError, Outcome, Prompt, Request};
use swarm_os::args::AnswerArgs;
use swarm_os::commands::plan::PlanReport;
use swarm_os::commands::{run, verify};
use swarm_os::failure::{Code, Failure};
use swarm_os::live::Shown;
use swarm_os::pairing::Company;
use swarm_os::present::text;
use swarm_os::settings::{self, Search, Start};
use swarm_os::start::Running;

use crate::answer::{Generation, Tally};
use crate::convert::{event, to_list, to_python};
use crate::given::{Given, prompt, wrong};
use crate::task::{Product, Task, Teller};
use crate::{errors, fork};

/// Between two looks for Ctrl-C while logits are computed.
const LOOK: Duration = Duration::from_millis(50);

/// An engine that was started.
pub struct Connected {
    running: Running,
    shown: Shown,
    single: Single,
}

/// What it takes to start the same model on this node alone.
struct Single(Start);

impl Single {
    fn start(&self) -> Result<Start, Failure> {
        let Start { config, identity, .. } = &self.0;
        let identity = identity.another_instance()?;
        Ok(Start { config: config.clone(), identity, local: None, join: None })
    }
}

/// What a running engine consists of; the engine goes before its workers.
pub struct Held {
    _shown: Shown,
    pub running: Running,
    single: Single,
}

/// A model that answers, on one node or many.
#[pyclass(frozen, module = "swarm_os._native")]
pub struct Engine {
    held: Mutex<Option<Arc<Held>>>,
    tally: Arc<Tally>,
}

fn start_of(
    given: &Given<'_, '_>,
) -> PyResult<impl FnOnce() -> Result<(Start, Single), Failure> + Send + use<>> {
    let (model, ring) = (given.model()?, given.ring()?);
    let discover = given.get("discover")?.unwrap_or(true) && ring.nodes.is_none();
    let search = Search { discover, required: discover && ring.join.is_some() };
    if let Some(again) = given.get("again")? {
        swarm_os::start::set_command(again);
    }
    Ok(move || {
        let start = Start::new(&model, &ring, search)?;
        let single = Single(start.alone(&model.compute)?);
        Ok((start, single))
    })
}

fn connected(start: Start, single: Single, teller: &Teller) -> Result<Connected, Failure> {
    let note = |text: &str| teller.note(text);
    let running = start.go_with(Company::of_program(&note), &|news| teller.event(event(&news)))?;
    let shown = run::show(&running.engine);
    Ok(Connected { running, shown, single })
}

/// Says now what is wrong with the settings of a master, as far as that can be told without looking for anything.
#[pyfunction]
pub fn check(settings: &Bound<'_, PyDict>) -> PyResult<()> {
    fork::check()?;
    let given = Given(settings);
    let (model, ring) = (given.model()?, given.ring()?);
    given.get::<bool>("discover")?;
    let checked = || -> Result<(), Failure> {
        settings::cores(&model.compute)?;
        settings::memory(&model.compute)?;
        ring.layers.as_deref().map(settings::layers).transpose()?;
        ring.join.as_deref().map(|code| settings::pair_code("--join", code)).transpose()?;
        Ok(())
    };
    checked().map_err(|failure| errors::of_failure(&failure))
}

/// Finds workers, places the layers, loads them everywhere. The result is an `Engine`.
#[pyfunction]
pub fn connect(settings: &Bound<'_, PyDict>) -> PyResult<Task> {
    fork::check()?;
    let start = start_of(&Given(settings))?;
    Task::begin("connect", move |teller| {
        let (start, single) = start()?;
        Ok(Product::Engine(Box::new(connected(start, single, teller)?)))
    })
}

/// Finds workers and places the layers, without loading anything. The result is a dictionary.
#[pyfunction]
pub fn plan(settings: &Bound<'_, PyDict>) -> PyResult<Task> {
    fork::check()?;
    let start = start_of(&Given(settings))?;
    Task::begin("plan", move |teller| {
        let note = |text: &str| teller.note(text);
        let (start, _) = start()?;
        let plan = start.plan_with(Company::of_program(&note), &|news| teller.event(event(&news)))?;
        let (model, quant) = (plan.model.name(), plan.model.quant());
        let report = PlanReport::new(&plan.plan, model, plan.context, quant, &plan.to_fetch);
        Ok(Product::Value(serde_json::to_value(report).unwrap_or_default()))
    })
}

impl Engine {
    pub fn new(Connected { running, shown, single }: Connected) -> Self {
        let held = Held { _shown: shown, running, single };
        Self { held: Mutex::new(Some(Arc::new(held))), tally: Arc::default() }
    }

    fn held(&self) -> PyResult<Arc<Held>> {
        fork::check()?;
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        held.ok_or_else(|| errors::raised("SwarmError", "it was closed; call connect() first"))
    }

    /// Does `work` with the engine while other threads go on.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&NodeEngine) -> Result<T, NodeError> + Send,
    ) -> PyResult<T> {
        let held = self.held()?;
        let done = py.detach(move || {
            let done = work(&held.running.engine).map_err(Failure::from);
            // The last one to hold a closed engine ends it, so not while others wait.
            drop(held);
            done
        });
        done.map_err(|failure| errors::of_failure(&failure))
    }

    fn prompt(&self, given: &Bound<'_, PyAny>, raw: Option<bool>, system: Option<&str>) -> PyResult<Prompt> {
        prompt(given, raw, system, self.held()?.running.engine.can_chat())
    }
}

fn request(given: &Given<'_, '_>, prompt: Prompt) -> PyResult<Request> {
    let number = |name: &str, default: f32| Ok::<_, PyErr>(given.get::<f32>(name)?.unwrap_or(default));
    let args = AnswerArgs {
        max_tokens: given.count("max_tokens")?.unwrap_or(512),
        temperature: number("temperature", 0.0)?,
        top_k: given.get("top_k")?.unwrap_or(0),
        top_p: number("top_p", 1.0)?,
        min_p: number("min_p", 0.0)?,
        repetition_penalty: number("repetition_penalty", 1.0)?,
        seed: given.get("seed")?.unwrap_or(0),
        system: None,
        stop: given.texts("stop")?,
    };
    let request = settings::request(&args, prompt).map_err(|failure| errors::of_failure(&failure))?;
    Ok(Request { keep: given.get("keep")?.unwrap_or(false), ..request })
}

#[pymethods]
impl Engine {
    /// Starts an answer.
    #[pyo3(signature = (prompt, **options))]
    fn generate(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Generation> {
        let none = PyDict::new(py);
        let given = Given(options.unwrap_or(&none));
        let system = given.get::<String>("system")?;
        let prompt = self.prompt(prompt, given.get("raw")?, system.as_deref())?;
        let request = request(&given, prompt)?;
        let held = self.held()?;
        let answer = self.with(py, |engine| engine.generate(request))?;
        Ok(Generation::new(answer, &held, self.tally.clone()))
    }

    /// The token ids that a prompt becomes.
    #[pyo3(signature = (prompt, raw=None))]
    fn tokenize(&self, py: Python<'_>, prompt: &Bound<'_, PyAny>, raw: Option<bool>) -> PyResult<Vec<u32>> {
        let prompt = self.prompt(prompt, raw, None)?;
        self.with(py, |engine| engine.ids(&prompt))
    }

    /// The token ids of a text and nothing else.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        self.with(py, |engine| Ok(engine.tokenizer().encode(text, EncodeOptions::TEXT)?))
    }

    /// The text of token ids.
    fn detokenize(&self, py: Python<'_>, ids: Vec<u32>, skip_special: bool) -> PyResult<String> {
        let size = self.held()?.running.engine.tokenizer().vocab_size();
        if let Some(id) = ids.iter().find(|&&id| id as usize >= size) {
            return Err(wrong(&format!("ids: token id {id} is not below the vocabulary size of {size}")));
        }
        self.with(py, |engine| Ok(engine.tokenizer().decode(&ids, skip_special)))
    }

    /// The logits after every position of a prompt, row by row, as f32; the number of rows and of columns.
    #[pyo3(signature = (prompt, raw=None))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        prompt: &Bound<'py, PyAny>,
        raw: Option<bool>,
    ) -> PyResult<(Bound<'py, PyByteArray>, usize, usize)> {
        let prompt = self.prompt(prompt, raw, None)?;
        let parts = self.with(py, |engine| engine.logits(&prompt))?;
        let (rows, columns) = (parts.positions, parts.vocab);
        let bytes = PyByteArray::new_with(py, rows * columns * size_of::<f32>(), |bytes| {
            let mut rest = bytes;
            while !rest.is_empty() {
                let written = py.detach(|| {
                    let part = parts.wait(LOOK)?;
                    let len = (part.len() * size_of::<f32>()).min(rest.len());
                    for (to, value) in rest[..len].chunks_exact_mut(size_of::<f32>()).zip(&part) {
                        to.copy_from_slice(&value.to_ne_bytes());
                    }
                    Ok(len)
                });
                let written: usize = written.map_err(|error: NodeError| errors::of_failure(&error.into()))?;
                py.check_signals()?;
                rest = &mut rest[written..];
            }
            Ok(())
        })?;
        Ok((bytes, rows, columns))
    }

    /// The same model on this node alone, another engine beside this one.
    fn alone(&self) -> PyResult<Task> {
        let held = self.held()?;
        Task::begin("connect", move |teller| {
            let (start, single) = (held.single.start()?, Single(held.single.start()?));
            Ok(Product::Engine(Box::new(connected(start, single, teller)?)))
        })
    }

    /// Places the layers anew where a node was lost, or is back.
    fn heal(&self) -> PyResult<Task> {
        let held = self.held()?;
        Task::begin("heal", move |teller| {
            let healed = held.running.engine.heal(&|news| teller.event(event(&news)))?;
            Ok(Product::Value(healed.into()))
        })
    }

    /// The same prompt on one node and over the ring; the result is a receipt.
    #[pyo3(signature = (prompt, max_tokens, raw=None))]
    fn verify(&self, prompt: &Bound<'_, PyAny>, max_tokens: usize, raw: Option<bool>) -> PyResult<Task> {
        let prompt = self.prompt(prompt, raw, None)?;
        if max_tokens == 0 {
            return Err(wrong("max_tokens: 0 is too small; give a number from 1 on"));
        }
        let held = self.held()?;
        Task::begin("verify", move |teller| {
            let ring = &held.running.engine;
            if ring.nodes().len() < 2 {
                return Err(Failure::usage(
                    "there is no ring to compare with: all layers are here; ask for one with split=\"always\" or nodes=N",
                ));
            }
            let request = verify::request(prompt, max_tokens);
            let alone = connected(held.single.start()?, Single(held.single.start()?), teller)?;
            let first = whole(&alone.running.engine, request.clone(), teller)?;
            drop(alone);
            let second = whole(ring, request, teller)?;
            let receipt = verify::Receipt::new(ring, &first, &second);
            Ok(Product::Value(serde_json::to_value(receipt).unwrap_or_default()))
        })
    }

    /// Which layers are where, why, and what that was compared with.
    fn plan<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let report = self.with(py, |engine| {
            let plan = engine.plan();
            let (model, quant) = (engine.model_name(), engine.quant());
            let report = PlanReport::new(&plan, model, engine.context(), quant, &[]);
            Ok(serde_json::to_value(report).unwrap_or_default())
        })?;
        to_python(py, &report)
    }

    /// The nodes of the ring, this one first.
    fn nodes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let nodes = self.with(py, |engine| Ok(engine.nodes()))?;
        let object = |node: &swarm_node::NodeReport| {
            json!({"name": node.name, "layers": [node.layers.start, node.layers.end],
                "bytes_loaded": node.bytes_loaded, "weight_bytes_per_token": node.weight_bytes_per_token,
                "round_trip_ms": node.round_trip_us.map(|us| us as f64 / 1e3),
                "state": format!("{:?}", node.state).to_lowercase()})
        };
        to_list(py, &nodes.iter().map(object).collect::<Vec<Value>>())
    }

    /// What it is doing.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let status = self.with(py, |engine| Ok(engine.watch().status()))?;
        to_python(py, &serde_json::to_value(status).unwrap_or_default())
    }

    /// What was measured of the answer that ended last; `None` before the first.
    fn last<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        fork::check()?;
        let last = self.tally.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        last.map(|report| to_python(py, &report)).transpose()
    }

    /// Tokens handed out so far.
    #[getter]
    fn tokens(&self) -> u64 {
        self.tally.tokens.load(Ordering::Relaxed)
    }

    /// Why the ring is down; `None` while it is up.
    #[getter]
    fn fault(&self, py: Python<'_>) -> PyResult<Option<String>> {
        self.with(py, |engine| Ok(engine.fault()))
    }

    #[getter]
    fn model(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |engine| Ok(engine.model_name().to_owned()))
    }

    /// Digest of the model, in hexadecimal.
    #[getter]
    fn fingerprint(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |engine| Ok(text::hex(&engine.fingerprint())))
    }

    /// Positions a session may have.
    #[getter]
    fn context(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |engine| Ok(engine.context()))
    }

    /// The model has a chat template.
    #[getter]
    fn can_chat(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |engine| Ok(engine.can_chat()))
    }

    /// Ends it. Answers on their way end with an error; workers wait for somebody else.
    fn close(&self) -> PyResult<()> {
        fork::check()?;
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        fork::let_go(held);
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        fork::let_go(held);
    }
}

/// The whole answer; one that ended in an error is no receipt.
fn whole(engine: &NodeEngine, request: Request, teller: &Teller) -> Result<Outcome, Failure> {
    let mut answer = engine.generate(request)?;
    while !teller.is_abandoned() && answer.next().is_some() {}
    if teller.is_abandoned() {
        return Err(Failure::silent(Code::Interrupted));
    }
    let outcome = answer.outcome().clone();
    run::check(engine, &outcome)?;
    match outcome.finish {
        Finish::Cancelled => Err(Failure::silent(Code::Interrupted)),
        _ => Ok(outcome),
    }
}
