//! `swarm-os demo`: a ring on this computer answers, shows what it did, and proves itself equal to one node.

use swarm_node::Finish;

use super::run;
use super::verify::{Receipt, request};
use crate::args::{DemoArgs, RingArgs, SplitArg};
use crate::failure::{Code, Failure};
use crate::interrupt::Repeat;
use crate::present::answer;
use crate::present::progress::Progress;
use crate::present::text::{self, AnswerOut};
use crate::settings::{self, Search, Start};

pub fn demo(args: &DemoArgs) -> Result<(), Failure> {
    let ring = RingArgs { nodes: Some(args.nodes), split: Some(SplitArg::Always), ..RingArgs::default() };
    let start = Start::new(&args.model, &ring, Search::NONE)?;
    let single = start.alone(&args.model.compute)?;
    let progress = Progress::new(false);
    text::note(&format!("starting {} nodes on this computer", args.nodes));
    let running = start.go(&progress)?;
    let engine = &running.engine;
    let names: Vec<String> = engine.nodes().into_iter().map(|node| node.name).collect();
    text::say(&format!("{} over {} nodes", text::line(engine.model_name()), names.len()))?;
    text::say(&format!("{}\n", text::placement(&engine.placement(), &names)))?;
    let prompt = settings::prompt(args.prompt.clone(), None, !engine.can_chat());
    let request = request(prompt, args.max_tokens);
    text::say(&format!("> {}", text::line(&args.prompt)))?;
    let out = AnswerOut::stdout();
    let over_ring = run::answer(engine, request.clone(), Repeat::End, |piece| Ok(out.piece(piece)?))?;
    text::say("\n")?;
    run::check(engine, &over_ring)?;
    if over_ring.finish == Finish::Cancelled {
        return Err(Failure::silent(Code::Interrupted));
    }
    text::say(&answer::telemetry(engine, &over_ring))?;
    let alone = single.go(&progress)?;
    let on_one = run::answer(&alone.engine, request, Repeat::End, |_| Ok(()))?;
    run::check(&alone.engine, &on_one)?;
    let receipt = Receipt::new(engine, &on_one, &over_ring);
    let yes = if receipt.equal { "yes" } else { "no" };
    text::say(&format!(
        "tokens {} and logits {}",
        receipt.token_hash_ring.get(..16).unwrap_or_default(),
        receipt.logits_hash_ring.as_deref().and_then(|hash| hash.get(..16)).unwrap_or("-")
    ))?;
    text::say(&format!("equal to one node: {yes}"))?;
    if receipt.equal { Ok(()) } else { Err(Failure::silent(Code::Failed)) }
}
