use std::cell::RefCell;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use xenstore_client::server::Server;

use super::script::Call;
use super::*;

const GUEST: DomId = DomId(62);
const BACK: &str = "/local/domain/0/backend/vif/62";
const FRONT: &str = "/local/domain/62/device/vif";

/// A store with one guest, and a thread that plays the backend and the guest.
struct Scene {
    server: Server,
    store: Client,
    stop: Arc<AtomicBool>,
    backend: Option<JoinHandle<()>>,
    /// What the built-in programs were asked.
    calls: RefCell<Vec<String>>,
    /// What they answer to `online`.
    answer: RefCell<Result<&'static str, &'static str>>,
    folder: tempfile::TempDir,
}

/// What the backend does with a device once `hotplug-status` is there.
#[derive(Clone, Copy, PartialEq)]
enum Backend {
    None,
    /// State 4.
    Connects,
    /// Waits for the guest for ever.
    Waits,
    /// An error and state 5, 6.
    Fails,
    /// State 5, 6 before the hotplug program could run.
    Refuses,
    /// Connects, and does not close.
    Holds,
}

impl Scene {
    fn new(backend: Backend) -> Self {
        let server = Server::new().unwrap();
        let store = server.connect(DomId::DOM0).unwrap();
        toolstack::create_domain(&store, DomId(0), "Domain-0").unwrap();
        toolstack::create_domain(&store, GUEST, "web").unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = (backend != Backend::None).then(|| {
            let (store, stop) = (server.connect(DomId::DOM0).unwrap(), Arc::clone(&stop));
            std::thread::spawn(move || play(&store, backend, &stop))
        });
        Self {
            server,
            store,
            stop,
            backend: thread,
            calls: RefCell::default(),
            answer: RefCell::new(Ok("connected")),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn with<T>(&self, act: impl FnOnce(Toolstack<'_>) -> T) -> T {
        let builtin = |store: &Client, call: Call<'_>| {
            let keys = ["bridge", "mac"].map(|key| store.read_opt(&format!("{}/{key}", call.backend_path)).unwrap());
            let bridge = keys[0].clone().unwrap_or_default();
            self.calls.borrow_mut().push(format!("{} {} {} {bridge}", call.script, call.event, call.vif));
            match (*self.answer.borrow(), call.event) {
                (_, Event::Offline) => Ok(()),
                (Ok(status), Event::Online) => {
                    store.write(&format!("{}/hotplug-status", call.backend_path), status).unwrap();
                    Ok(())
                }
                (Err(why), Event::Online) => Err(why.to_owned()),
            }
        };
        act(Toolstack { store: &self.store, backend: DomId::DOM0, builtin: &builtin })
    }

    fn attach(&self, spec: &str) -> Result<Attached, Error> {
        let spec = spec.parse().unwrap_or_else(|e| panic!("{e}"));
        self.with(|vifs| vifs.attach(GUEST, &spec, Duration::from_millis(if self.backend.is_some() { 300 } else { 0 })))
    }

    fn detach(&self, which: &str, force: bool) -> Result<(u32, Option<String>), Error> {
        self.with(|vifs| vifs.detach(GUEST, which.parse().unwrap(), force))
    }

    /// Everything there is about interfaces: names below both directories.
    fn traces(&self) -> Vec<String> {
        let names = |path: &str| self.store.directory_opt(path).unwrap().unwrap_or_default();
        [BACK, FRONT].into_iter().flat_map(names).collect()
    }

    fn pairs(&self, directory: &str) -> Vec<(String, String)> {
        let names = self.store.directory(directory).unwrap();
        names
            .into_iter()
            .map(|name| (name.clone(), self.store.read_str(&format!("{directory}/{name}")).unwrap()))
            .collect()
    }

    /// An executable script, and a file for it to write to.
    fn script(&self, text: &str) -> (PathBuf, PathBuf) {
        let (script, output) = (self.folder.path().join("vif-mine"), self.folder.path().join("said"));
        std::fs::write(&script, format!("#!/bin/sh\nexec 3>>{}\n{text}\n", output.display())).unwrap();
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        (script, output)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.backend.take() {
            // A panic of the thread was printed; the test has failed or will.
            let _ = thread.join();
        }
    }
}

fn play(store: &Client, backend: Backend, stop: &AtomicBool) {
    let read = |path: &str| store.read_opt(path).unwrap();
    // Written only where the device still is: a backend's transaction sees to that.
    let state = |dir: &str, state: &str| {
        store
            .transaction(|tx| match tx.read_opt(&format!("{dir}/state"))? {
                Some(_) => tx.write(&format!("{dir}/state"), state),
                None => Ok(()),
            })
            .unwrap();
    };
    while !stop.load(Ordering::Acquire) {
        for devid in store.directory_opt(BACK).unwrap().unwrap_or_default() {
            let dir = format!("{BACK}/{devid}");
            let status = read(&format!("{dir}/hotplug-status")).unwrap_or_default();
            match (read(&format!("{dir}/state")).as_deref(), backend) {
                (Some("1"), Backend::Refuses) => {
                    store.write(&format!("{dir}/error"), "22 the mac is no address").unwrap();
                    state(&dir, "6");
                }
                (Some("1"), _) => state(&dir, "2"),
                (Some("2"), Backend::Fails) if status == "connected" => {
                    store.write(&format!("{dir}/error"), "16 the tap is busy").unwrap();
                    state(&dir, "5");
                }
                (Some("2"), Backend::Connects | Backend::Holds) if status == "connected" => state(&dir, "4"),
                (Some("5"), Backend::Holds) => {}
                (Some("5"), _) => state(&dir, "6"),
                _ => {}
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn libxls_keys_in_libxls_order() {
    let scene = Scene::new(Backend::Connects);
    let attached = scene
        .attach(
            "mac=00:16:3e:5f:77:fd,bridge=xenbr1,ip=10.0.0.1 2001:db8::1,script=vif-route,vifname=web0,rate=10Mb/s,\
             devid=3,mtu=9000,vlan=10p/20,gatewaydev=eth0,untrusted,antispoof=off,type=ioemu,model=e1000",
        )
        .unwrap();
    assert_eq!((attached.devid, attached.connected), (3, true));
    let (back, front) = (format!("{BACK}/3"), format!("{FRONT}/3"));
    let expected = [
        ("frontend", front.as_str()),
        ("frontend-id", "62"),
        ("script", "/etc/xen/scripts/vif-route"),
        ("vifname", "web0"),
        ("mac", "00:16:3e:5f:77:fd"),
        ("ip", "10.0.0.1 2001:db8::1"),
        ("gatewaydev", "eth0"),
        ("rate", "62500,50000"),
        ("mtu", "9000"),
        ("vlan", "10p/20"),
        ("bridge", "xenbr1"),
        ("handle", "3"),
        ("type", "vif"),
        ("antispoof", "off"),
        ("hotplug-status", "connected"),
        ("state", "4"),
        ("online", "1"),
    ];
    let sorted = |mut pairs: Vec<(String, String)>| {
        pairs.sort_unstable();
        pairs
    };
    let owned = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    assert_eq!(sorted(scene.pairs(&back)), sorted(owned(&expected)));
    let expected = [
        ("backend", back.as_str()),
        ("backend-id", "0"),
        ("handle", "3"),
        ("mac", "00:16:3e:5f:77:fd"),
        ("mtu", "9000"),
        ("trusted", "0"),
        ("state", "1"),
    ];
    assert_eq!(sorted(scene.pairs(&front)), sorted(owned(&expected)));
    let owner = |path: &str| scene.store.get_perms(path).unwrap()[0].dom;
    assert_eq!((owner(&format!("{front}/mac")), owner(&format!("{back}/mac"))), (GUEST, DomId(0)));
    // The order is that of the function.
    let spec = "mac=00:16:3e:5f:77:fd,vifname=a,mtu=1500".parse().unwrap();
    let (back, front) = keys(&spec, 0, spec.mac.unwrap(), &Script::new(None));
    let names = |pairs: &Pairs| pairs.iter().map(|(key, _)| *key).collect::<Vec<_>>();
    assert_eq!(names(&back), ["script", "vifname", "mac", "mtu", "bridge", "handle", "type", "hotplug-status"]);
    assert_eq!(names(&front), ["handle", "mac", "mtu", "trusted"]);
}

#[test]
fn nothing_said_means_the_next_number_a_random_address_and_xenbr0() {
    let scene = Scene::new(Backend::Waits);
    // A card of another backend's.
    scene.store.write(&format!("{FRONT}/1/state"), "4").unwrap();
    let numbers: Vec<u32> = (0..3).map(|_| scene.attach("").unwrap().devid).collect();
    assert_eq!(numbers, [0, 2, 3]);
    assert_eq!(scene.detach("2", false).unwrap(), (2, None));
    let again = scene.attach("").unwrap();
    assert_eq!((again.devid, again.connected), (2, false));
    assert_eq!(again.mac.0[..3], [0, 0x16, 0x3e]);
    assert_eq!(scene.calls.borrow()[0], "/etc/xen/scripts/vif-bridge online vif62.0 xenbr0");
    assert_eq!(scene.store.read_str(&format!("{FRONT}/2/mac")).unwrap(), again.mac.to_string());
}

#[test]
fn what_fails_leaves_nothing() {
    for (backend, answer, spec, words, offline) in [
        (Backend::Connects, Err("no bridge xenbr9"), "bridge=xenbr9", "no bridge xenbr9", 1),
        (Backend::Connects, Ok("error"), "", "hotplug-status is \"error\"", 1),
        (Backend::Connects, Ok(""), "", "without writing hotplug-status", 1),
        (Backend::Fails, Ok("connected"), "", "16 the tap is busy", 1),
        (Backend::Refuses, Ok("connected"), "", "22 the mac is no address", 0),
        (Backend::Connects, Ok("connected"), "script=/no/such/script", "No such file", 0),
        (Backend::Connects, Ok("connected"), "script=/etc", "no file", 0),
        (Backend::Connects, Ok("connected"), "script=/etc/passwd", "chmod +x", 0),
        (Backend::Connects, Ok("connected"), "script=vif-openvswitch", "vif-bridge, vif-route, vif-nat", 0),
        (Backend::Connects, Ok("connected"), "backend=web", "attach the interface there", 0),
        (Backend::Connects, Ok("connected"), "backend=nobody", "62 (web)", 0),
    ] {
        let scene = Scene::new(backend);
        *scene.answer.borrow_mut() = answer;
        let error = scene.attach(spec).expect_err(spec).to_string();
        assert!(error.contains(words), "{spec}: {error:?} does not say {words:?}");
        assert_eq!(scene.traces(), [""; 0], "{spec}");
        let ran = scene.calls.borrow().iter().filter(|call| call.contains(" offline ")).count();
        assert_eq!(ran, offline, "{spec}: {:?}", scene.calls.borrow());
    }
    // Not even the directory of a domain that does not exist.
    let scene = Scene::new(Backend::Connects);
    let error = scene.with(|vifs| vifs.attach(DomId(7), &VifSpec::default(), Duration::ZERO)).unwrap_err().to_string();
    assert!(error.contains("no domain \"7\"") && error.contains("62 (web)"), "{error}");
}

#[test]
fn a_number_is_taken_once() {
    let scene = Scene::new(Backend::Waits);
    scene.attach("devid=2,backend=Domain-0").unwrap();
    let error = scene.attach("devid=2").unwrap_err().to_string();
    assert!(error.contains("has an interface 2 already"), "{error}");
    assert_eq!(scene.traces(), ["2", "2"]);
}

#[test]
fn attaching_at_the_same_time() {
    let scene = Scene::new(Backend::Connects);
    let attach = || {
        let store = scene.server.connect(DomId::DOM0).unwrap();
        let builtin = |store: &Client, call: Call<'_>| {
            store
                .write(&format!("{}/hotplug-status", call.backend_path), "connected")
                .map_err(|error| error.to_string())
        };
        let vifs = Toolstack { store: &store, backend: DomId::DOM0, builtin: &builtin };
        vifs.attach(GUEST, &VifSpec::default(), Duration::from_secs(20)).unwrap().devid
    };
    // Each of several administrators gets a number of his own.
    let mut devids: Vec<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(attach)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    devids.sort_unstable();
    assert_eq!(devids, (0..8).collect::<Vec<_>>());
}

#[test]
fn detaching_by_number_and_by_address() {
    let scene = Scene::new(Backend::Connects);
    let error = |which: &str| scene.detach(which, false).expect_err(which).to_string();
    assert!(error("0").contains("nor any other"));
    for spec in ["mac=00:16:3e:00:00:01", "mac=00:16:3e:00:00:02", "mac=00:16:3e:00:00:02,bridge=other"] {
        scene.attach(spec).unwrap();
    }
    assert!(error("5").contains("it has 0 (00:16:3e:00:00:01), 1 (00:16:3e:00:00:02)"), "{}", error("5"));
    assert!(error("00:16:3e:00:00:03").contains("no interface 00:16:3e:00:00:03"));
    assert!(error("00:16:3e:00:00:02").contains("interfaces 1 and 2"), "{}", error("00:16:3e:00:00:02"));
    assert_eq!(scene.detach("00:16:3E:00:00:01", false).unwrap(), (0, None));
    scene.detach("2", false).unwrap();
    scene.detach("1", false).unwrap();
    assert_eq!(scene.traces(), [""; 0]);
    assert_eq!(scene.calls.borrow().last().unwrap(), "/etc/xen/scripts/vif-bridge offline vif62.1 xenbr0");
    for wrong in ["", "-1", "+1", "vif62.0", "4294967296"] {
        assert!(wrong.parse::<Which>().unwrap_err().contains("00:16:3e:3f:a9:06"), "{wrong}");
    }
    assert!("00:16".parse::<Which>().unwrap_err().contains('^'));
}

#[test]
fn a_guest_that_has_left_is_asked_again() {
    let scene = Scene::new(Backend::Waits);
    scene.attach("").unwrap();
    scene.store.write(&format!("{BACK}/0/state"), "6").unwrap();
    scene.detach("0", false).unwrap();
    assert_eq!(scene.traces(), [""; 0]);
}

#[test]
fn a_guest_that_holds_on() {
    let scene = Scene::new(Backend::Holds);
    scene.attach("").unwrap();
    let detach =
        |force| scene.with(|vifs| vifs.detach_within(Duration::from_millis(100), GUEST, Which::Devid(0), force));
    let error = detach(false).unwrap_err().to_string();
    assert!(error.contains("did not let go of interface 0") && error.contains("--force"), "{error}");
    assert_eq!(scene.traces(), ["0", "0"]);
    assert!(!scene.calls.borrow().iter().any(|call| call.contains("offline")), "its link is still in use");
    assert_eq!(detach(true).unwrap(), (0, None));
    assert_eq!(scene.traces(), [""; 0]);
    assert!(scene.calls.borrow().iter().any(|call| call.contains("offline")));
}

/// What libxl gives to a script, which writes to XenStore by way of this test.
#[test]
fn a_script_of_the_administrators() {
    let scene = Scene::new(Backend::Connects);
    let (script, output) = scene.script(
        "echo \"$@\" >&3; for v in script XENBUS_TYPE XENBUS_PATH XENBUS_BASE_PATH netdev vif; do eval echo \\$$v >&3; done",
    );
    let device = scene.with(|vifs| vifs.device(GUEST, 5));
    let path = script.to_str().unwrap();
    let environment = script::environment(path, &device, "vif62.5", Some("eth0".to_owned()));
    script::execute(path, Event::Offline, &environment, Duration::from_secs(20)).unwrap();
    let said = std::fs::read_to_string(&output).unwrap();
    assert_eq!(said, format!("offline type_if=vif\n{path}\nvif\nbackend/vif/62/5\nbackend\neth0\nvif62.5\n"));
}

#[test]
fn scripts_that_fail() {
    let scene = Scene::new(Backend::Connects);
    let run = |script: &Path, limit| script::execute(script.to_str().unwrap(), Event::Online, &[], limit);
    let long = Duration::from_secs(60);
    let (script, _) = scene.script("exit 3");
    assert!(run(&script, long).unwrap_err().contains("exit status: 3"));
    let (script, _) = scene.script("kill -9 $$");
    assert!(run(&script, long).unwrap_err().contains("signal: 9"));
    // What it started goes with it.
    let (script, output) = scene.script("sleep 600 & echo $! >&3; exec 3>&-; wait");
    let mut limit = Duration::from_millis(500);
    let sleeper = loop {
        assert!(run(&script, limit).unwrap_err().contains("did not end within"));
        // On a busy machine its time may be over before it has got so far.
        match std::fs::read_to_string(&output) {
            Ok(said) if !said.is_empty() => break said,
            _ => limit *= 2,
        }
        assert!(limit < 4 * long, "the script says nothing");
    };
    let status = format!("/proc/{}/stat", sleeper.trim());
    // Nobody may have collected it; then it is a zombie.
    let gone = || std::fs::read_to_string(&status).map_or(true, |stat| stat.contains(") Z "));
    let began = Instant::now();
    while !gone() {
        assert!(began.elapsed() < long, "{}", std::fs::read_to_string(&status).unwrap());
        std::thread::sleep(Duration::from_millis(5));
    }
    // Attached with one: hotplug-error is what is said, and offline has run. It waits for its error to be there.
    let go = scene.folder.path().join("go");
    let wait = format!("while ! test -e {}; do sleep 0.01; done", go.display());
    std::fs::remove_file(&output).unwrap();
    let (script, output) = scene.script(&format!("{wait}; echo $1 >&3; test $1 = offline"));
    let teller = {
        let store = scene.store.clone();
        std::thread::spawn(move || {
            toolstack::wait_state(&store, &format!("{BACK}/0/state"), &[State::InitWait], long).unwrap();
            store.write(&format!("{BACK}/0/hotplug-error"), "no bridge xenbr7").unwrap();
            std::fs::write(go, "").unwrap();
        })
    };
    let error = scene.attach(&format!("script={}", script.display())).unwrap_err().to_string();
    teller.join().unwrap();
    assert!(error.contains("no bridge xenbr7") && error.contains("exit status: 1"), "{error}");
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "online\noffline\n");
    assert_eq!(scene.traces(), [""; 0]);
}

#[test]
fn the_table_of_network_list() {
    let scene = Scene::new(Backend::Connects);
    let header = "Idx BE Mac Addr.         handle state evt-ch   tx-/rx-ring-ref BE-path                       \n";
    let listed = || scene.with(|vifs| list(vifs.store, &[GUEST])).unwrap();
    assert_eq!(listed(), header);
    scene.attach("mac=00:16:3E:21:4F:83").unwrap();
    let row = "0   0  00:16:3e:21:4f:83     0     1     -1    -1/-1          /local/domain/0/backend/vif/62/0\n";
    assert_eq!(listed(), format!("{header}{row}"));
    for (key, value) in [("state", "4"), ("event-channel", "10"), ("tx-ring-ref", "768"), ("rx-ring-ref", "769")] {
        scene.store.write(&format!("{FRONT}/0/{key}"), value).unwrap();
    }
    let row = "0   0  00:16:3e:21:4f:83     0     4     10   768/769         /local/domain/0/backend/vif/62/0\n";
    assert_eq!(listed(), format!("{header}{row}"));
    scene.store.write(&format!("{BACK}/0/error"), "22 no rings").unwrap();
    assert_eq!(listed(), format!("{header}{row}    vif62.0: 22 no rings\n"));
    // A guest writes what it likes into its directory; none of it reaches the terminal.
    for (key, value) in [("state", "\x1b[31m"), ("tx-ring-ref", "-5"), ("backend", "/local/domain/0/x\x1b[31m")] {
        scene.store.write(&format!("{FRONT}/0/{key}"), value).unwrap();
    }
    let row = "0   -1 00:00:00:00:00:00     0    -1     10    -1/769         (the guest has overwritten it)\n";
    assert_eq!(listed(), format!("{header}{row}"));
    // A row for each interface, one header for all domains.
    toolstack::create_domain(&scene.store, DomId(63), "db").unwrap();
    scene.attach("").unwrap();
    let both = scene.with(|vifs| list(vifs.store, &[DomId(63), GUEST])).unwrap();
    assert_eq!(both.lines().count(), 3, "{both}");
}
