//! The queueing discipline of a link (RTM_NEWQDISC, linux/rtnetlink.h).

use super::wire::Message;
use super::{Error, Link};

const RTM_NEWQDISC: u16 = 36;
const TCA_KIND: u16 = 1;
/// TC_H_ROOT of linux/pkt_sched.h.
const ROOT: u32 = 0xffff_ffff;

impl Link {
    /// Lets frames pass to a link without queueing them first.
    ///
    /// For taps: theirs are queued behind the link in any case, and one with several queues gets 256 disciplines of the
    /// kernel's otherwise when it goes up, 6 MB of them.
    ///
    /// # Errors
    /// When there is no such link, or a kernel without queueing disciplines.
    pub fn pass_unqueued(&mut self, name: &str) -> Result<(), Error> {
        let index = self.index(name)?;
        let mut message =
            Message::new(RTM_NEWQDISC, libc::NLM_F_CREATE | libc::NLM_F_REPLACE | libc::NLM_F_ACK, &header(index));
        message.text(TCA_KIND, "noqueue");
        self.change(message)
    }
}

/// struct tcmsg, for the root.
fn header(index: u32) -> [u8; 20] {
    let mut fixed = [0; 20];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[12..16].copy_from_slice(&ROOT.to_ne_bytes());
    fixed
}
