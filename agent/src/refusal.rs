//! The reason why a request was refused: the ERROR frame that answers it.

use kmp_proto::wire::ErrorCode;

use crate::workload::AskError;

/// Why a request was not done: an ERROR frame.
#[derive(Debug)]
pub struct Refusal {
    /// Its code.
    pub code: ErrorCode,
    /// Its text.
    pub text: String,
}

impl Refusal {
    pub(crate) fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { code, text }
    }
}

impl From<AskError> for Refusal {
    fn from(error: AskError) -> Self {
        let code = match &error {
            AskError::NotRunning(_) | AskError::NotCooperative => ErrorCode::UnexpectedInState,
            AskError::Exchange(_) => ErrorCode::Internal,
        };
        Self::new(code, error.to_string())
    }
}
