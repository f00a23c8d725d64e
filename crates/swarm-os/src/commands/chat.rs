use crate::args::ChatArgs;
use crate::failure::Failure;
pub fn chat(_: &ChatArgs) -> Result<(), Failure> { Ok(()) }
