//! A worker and its client read frames from each other; whatever comes, they may only complain.

#![no_main]

use dw_engine::worker::{
    frame,
    protocol::{Answer, Command},
};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut reader = bytes;
    while let Ok(Some(body)) = frame::read(&mut reader) {
        let _ = frame::decode::<Answer>(&body);
        if let Ok(command) = frame::decode::<Command>(&body) {
            let mut again = Vec::new();
            frame::write(&mut again, &command).expect("what was a frame fits into one");
            let body = frame::read(&mut again.as_slice()).expect("whole").expect("a frame");
            frame::decode::<Command>(&body).expect("a command stays one");
        }
    }
});
