
function Get-State($request) {
    $state = @{
        thumbprint = [string] $request['thumbprint']; present = $false; has_key = $false; sha256 = ''; friendly_name = ''; unread = [string[]] @()
        chain_missing = [string[]] @(); ours = [string[]] @(Get-Ours $request)
        binding = ''; bound = ''; bound_store = ''; bound_flags = 0; sharing = [string[]] @()
    }
    $certificate = Find-Certificate (Open-Store $request['store'] $request['location'] 'OpenExistingOnly, ReadOnly') $request['thumbprint']
    if ($null -ne $certificate) {
        $state.present = $true
        $state.has_key = [bool] $certificate.HasPrivateKey
        $state.sha256 = Get-Sha256 $certificate
        $state.friendly_name = [string] $certificate.FriendlyName
    }
    if ($state.has_key) {
        $state.unread = [string[]] @(Get-Unread $request $certificate)
    } else {
        foreach ($account in $request['key_readers']) { $null = Get-Sid $account }
        $state.unread = [string[]] @($request['key_readers'])
    }
    $authorities = Open-Store 'CA' $request['location'] 'OpenExistingOnly, ReadOnly'
    $state.chain_missing = [string[]] @(foreach ($certificate in @(Get-Chain $request)) {
        if ($null -eq (Find-Certificate $authorities $certificate.Thumbprint)) { $certificate.Thumbprint }
    })
    if ($request['site'] -ne '') {
        $manager = Open-Iis
        $binding = Find-Binding (Find-Site $manager $request['site']) $request['binding']
        $state.bound_flags = [int] $request['ssl_flags']
        if ($null -ne $binding) {
            $state.binding = 'https'
            $state.bound = Get-Hex $binding.CertificateHash
            $state.bound_store = [string] $binding.CertificateStoreName
            $state.bound_flags = [int] $binding.SslFlags
        }
        $state.sharing = [string[]] @(Get-Sharing $manager $request $binding $state.bound_flags)
    }
    return $state
}

function Write-State($request) {
    Add-Chain $request
    Import-Certificate $request
    $store = Open-Store $request['store'] $request['location'] 'OpenExistingOnly, ReadWrite'
    $certificate = Find-Certificate $store $request['thumbprint']
    if ($null -eq $certificate -or -not $certificate.HasPrivateKey) { Fail 'key-missing' $request['thumbprint'] }
    if ($request['friendly_name'] -ne '' -and $certificate.FriendlyName -cne $request['friendly_name']) {
        $certificate.FriendlyName = $request['friendly_name']
    }
    Set-Readers $certificate @(Get-Unread $request $certificate) $true
    if ($request['site'] -ne '') { Write-Binding $request }
}

function Restore-State($request) {
    $was = $request['was']
    if ($request['site'] -ne '') { Restore-Binding $request }
    $used = @(Get-Used $request)
    foreach ($thumbprint in @(Get-Marked $request $request['store'] $request['target'])) {
        if ($was['ours'] -notcontains $thumbprint -and $used -notcontains $thumbprint) { Remove-Marked $request $request['store'] $thumbprint }
    }
    if ($was['present']) {
        $store = Open-Store $request['store'] $request['location'] 'OpenExistingOnly, ReadWrite'
        $certificate = Find-Certificate $store $was['thumbprint']
        if ($null -ne $certificate) {
            if ($certificate.FriendlyName -cne $was['friendly_name']) { $certificate.FriendlyName = $was['friendly_name'] }
            if ($certificate.HasPrivateKey) { Set-Readers $certificate $was['unread'] $false }
        }
    }
    Remove-UnusedChain $request
}

# Removes our older certificates that are not in use: with a site all except those to keep, else the
# expired ones.
function Finish-State($request) {
    $name = $request['store']
    $store = Open-Store $name $request['location'] 'OpenExistingOnly, ReadOnly'
    $current = Find-Certificate $store $request['thumbprint']
    $used = @(Get-Used $request)
    $older = @(Get-Marked $request $name $request['target'] | Where-Object { $_ -ne $request['thumbprint'] } |
        Sort-Object -Descending -Property { Get-MarkTime $request $name $_ })
    $kept = 0
    foreach ($thumbprint in $older) {
        $certificate = Find-Certificate $store $thumbprint
        if ($null -ne $certificate) {
            if ($used -contains $thumbprint) { continue }
            if ($request['site'] -eq '') {
                $over = $request['remove_expired'] -and $null -ne $current -and $certificate.Subject -eq $current.Subject -and $certificate.NotAfter -lt [DateTime]::Now
                if (-not $over) { continue }
            } elseif ($kept -lt $request['keep']) {
                $kept++
                continue
            }
        }
        Remove-Marked $request $name $thumbprint
    }
    Remove-UnusedChain $request
}

function Get-Code($record) {
    $base = $record.Exception.GetBaseException()
    if ($base.Data.Contains('code')) { return [string] $base.Data['code'] }
    if ($base.HResult -eq -2147024891) { return 'access-denied' }
    return 'failed'
}

function Get-HostState($request) {
    $identity = [Security.Principal.WindowsIdentity]::GetCurrent()
    $seen = @{
        powershell = [string] $PSVersionTable.PSVersion
        language_mode = [string] $ExecutionContext.SessionState.LanguageMode
        dotnet = 0
        windows = [string] [Environment]::OSVersion.Version
        user = [string] $identity.Name
        administrator = [bool] (New-Object System.Security.Principal.WindowsPrincipal $identity).IsInRole([Security.Principal.WindowsBuiltInRole]::Administrator)
        store = ''; iis = ''; sites = [string[]] @()
    }
    $framework = [Microsoft.Win32.Registry]::LocalMachine.OpenSubKey('SOFTWARE\Microsoft\NET Framework Setup\NDP\v4\Full')
    if ($null -ne $framework) { $seen.dotnet = [int] $framework.GetValue('Release') }
    try {
        $null = Open-Store $request['store'] $request['location'] 'OpenExistingOnly, ReadWrite' # writes nothing
    } catch {
        $seen.store = Get-Code $_
    }
    try {
        $manager = Open-Iis
        $seen.sites = [string[]] @(foreach ($site in $manager.Sites) { $site.Name })
    } catch {
        $seen.iis = Get-Code $_
    }
    return $seen
}

function Invoke-Request($request, $answer) {
    switch ($request['operation']) {
        'read' { }
        'write' { Write-State $request }
        'restore' { Restore-State $request }
        'finish' { Finish-State $request }
        'selftest' {
            $answer.host = Get-HostState $request
            return
        }
        default { Fail 'request' '' }
    }
    $answer.state = Get-State $request
}

$answer = @{ contract = 1; code = ''; detail = ''; message = ''; hresult = 0; line = 0; state = $null; host = $null }
$lock = $null
$locked = $false
try {
    $request = Read-Request
    # Only one run at a time, so an undo waits for a run that a lost connection left behind. A mutex is
    # accessible to the account that created it and, if that is an administrator, to Administrators, so
    # each user has its own.
    $name = 'Global\certctl-agent'
    if ($request['location'] -eq 'CurrentUser') { $name = [string]::Concat($name, '-', [Security.Principal.WindowsIdentity]::GetCurrent().User.Value) }
    try {
        $lock = New-Object System.Threading.Mutex $false, $name
    } catch {
        Fail 'busy' $name # another account created it and does not share it
    }
    try {
        $locked = $lock.WaitOne(30000)
    } catch [System.Threading.AbandonedMutexException] {
        $locked = $true
    }
    if (-not $locked) { Fail 'busy' $name }
    Invoke-Request $request $answer
} catch {
    $base = $_.Exception.GetBaseException()
    $answer.code = Get-Code $_
    $answer.detail = [string] $base.Data['detail']
    $answer.message = [string] $base.Message
    $answer.hresult = [int] $base.HResult
    $answer.line = [int] $_.InvocationInfo.ScriptLineNumber
} finally {
    if ($locked) { $lock.ReleaseMutex() }
}

# Non-ASCII characters are escaped, so that no code page changes them.
$json = ConvertTo-Json -InputObject $answer -Compress -Depth 4
$escape = { param($match) [string]::Concat('\u', ([int] [char] $match.Value).ToString('x4')) }
[Console]::Out.WriteLine([regex]::Replace($json, '[^\x20-\x7e]', $escape))
