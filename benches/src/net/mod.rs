//! The network of an emulated machine: [namespaces](netns) for dom0, the guests and the outside, [links](link) inside
//! them, [cards](card) that make them [guests of the emulated machine](vif_guest), and [traffic] between them.

pub mod card;
pub mod forwarder;
pub mod link;
pub mod measure;
pub mod netns;
pub mod plan;
pub mod scene;
pub mod traffic;
pub mod vif_guest;
