//! The only place that touches bytes another domain may change.
//!
//! A guest can write to its pages while we look at them, so there is never a reference or a slice into them: a
//! [`Mapping`] hands out copies, made by volatile or atomic loads, each byte loaded once. What the kernel is to read
//! or fill is named by an [`IoList`], which keeps the mappings alive for as long as the kernel may touch them.

#![allow(unsafe_code)]

mod iolist;
mod mapping;

pub use iolist::IoList;
pub use mapping::Mapping;
