use crate::args::DemoArgs;
use crate::failure::Failure;
pub fn demo(_: &DemoArgs) -> Result<(), Failure> { Ok(()) }
