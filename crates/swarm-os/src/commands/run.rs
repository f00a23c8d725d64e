//! `swarm-os run`: one prompt, one answer.

use swarm_node::{Engine, Finish, Outcome, Request};

use crate::args::RunArgs;
use crate::failure::{Code, Failure};
use crate::interrupt::{self, Repeat};
use crate::live::{self, Shown};
use crate::present::answer;
use crate::present::progress::Progress;
use crate::present::report::{RunReport, json};
use crate::present::text::{self, AnswerOut};
use crate::present::trace::TraceFile;
use crate::settings::{self, Search, Start};

pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let text = settings::prompt_text(&args.prompt)?;
    let prompt = settings::prompt(text, args.answer.system.as_deref(), args.raw);
    let mut request = settings::request(&args.answer, prompt)?;
    request.logits_hash = args.json;
    request.trace = args.trace.is_some();
    let trace = args.trace.as_deref().map(TraceFile::open).transpose()?;
    let start = Start::new(&args.model, &args.ring, Search::when(args.discover, &args.ring))?;
    let progress = Progress::new(start.local.is_none());
    let running = start.go(&progress)?;
    let plan = running.engine.plan();
    if !plan.left_out.is_empty() {
        text::note(&format!("{}; --split always decides otherwise", plan.sentence));
    }
    let _shown = show(&running.engine);
    let outcome = if args.json {
        answer(&running.engine, request, Repeat::End, |_| Ok(()))?
    } else {
        let out = AnswerOut::stdout();
        let outcome = answer(&running.engine, request, Repeat::End, |piece| Ok(out.piece(piece)?))?;
        out.piece("\n")?;
        outcome
    };
    if let Some(trace) = trace {
        trace.write(&running.engine.nodes(), &outcome.telemetry.laps)?;
    }
    check(&running.engine, &outcome)?;
    if args.json {
        json(&RunReport::new(&running.engine, &outcome))?;
    }
    if args.stats {
        answer::telemetry(&running.engine, &outcome).lines().for_each(text::note);
    }
    match outcome.finish {
        Finish::Cancelled => Err(Failure::silent(Code::Interrupted)),
        _ => Ok(()),
    }
}

/// Lets `status` see an engine.
pub fn show(engine: &Engine) -> Shown {
    let watch = engine.watch();
    live::show("coordinator", move || serde_json::to_value(watch.status()).unwrap_or_default())
}

/// Gives each piece of the answer to `show` as it comes. Ctrl-C ends the answer; a piece that cannot be shown does,
/// too.
pub fn answer(
    engine: &Engine,
    request: Request,
    repeat: Repeat,
    mut show: impl FnMut(&str) -> Result<(), Failure>,
) -> Result<Outcome, Failure> {
    let mut generation = engine.generate(request)?;
    let _interrupt = interrupt::during(repeat, generation.canceller());
    for piece in &mut generation {
        show(&piece.text)?;
    }
    Ok(generation.outcome().clone())
}

/// An answer that ended in an error is a failure, with the ring's fault when it has one.
pub fn check(engine: &Engine, outcome: &Outcome) -> Result<(), Failure> {
    let Finish::Error(why) = &outcome.finish else { return Ok(()) };
    Err(match engine.fault() {
        Some(fault) => Failure::new(
            Code::Ring,
            format!("the ring was lost: {fault}; check that node and its network, then ask again"),
        ),
        None => ended_early(why),
    })
}

/// An answer that could not go on, for a reason that is not the ring's.
pub fn ended_early(why: &str) -> Failure {
    Failure::new(Code::Failed, format!("the answer ended early: {why}"))
}
